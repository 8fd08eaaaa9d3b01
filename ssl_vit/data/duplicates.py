"""Exact duplicates among candidate pairs of images."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, UnreadableImageError
from ssl_vit.runtime.workers import map_threads


def exact_duplicates(dataset: ImageDataset, other: ImageDataset, pairs: Tensor) -> Tensor:
    """Return those of the pairs (P, 2) int64 of indices into `dataset` and `other` that are equal byte for byte.

    Only the images in the pairs are read, each once. An unreadable image equals no other.
    """
    first, second = _digests(dataset, pairs[:, 0]), _digests(other, pairs[:, 1])
    same = [first[a] is not None and first[a] == second[b] for a, b in pairs.tolist()]
    return pairs[torch.tensor(same, dtype=torch.bool)]


def _digests(dataset: ImageDataset, indices: Tensor) -> dict[int, bytes | None]:
    """Hash the content of each image; None if it cannot be read."""
    unique = torch.unique(indices).tolist()
    digests = map_threads(lambda i: _digest(dataset, unique[i]), len(unique), label="comparing duplicates", show=True)
    return dict(zip(unique, digests, strict=True))


def _digest(dataset: ImageDataset, index: int) -> bytes | None:
    try:
        return hashlib.sha256(dataset.content(index)).digest()
    except UnreadableImageError:
        return None
