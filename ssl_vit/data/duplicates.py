"""Images that are stored byte for byte alike, among pairs that look alike."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, UnreadableImageError
from ssl_vit.runtime.workers import map_threads


def exact_duplicates(dataset: ImageDataset, others: ImageDataset, pairs: Tensor) -> Tensor:
    """Those pairs (P, 2) int64 of places, in `images` and in `others`, that have the same content.

    Only the images in the pairs are read, each once. What cannot be read is like nothing else.
    """
    first, second = (_digests(*part) for part in ((dataset, pairs[:, 0]), (others, pairs[:, 1])))
    same = [first[a] is not None and first[a] == second[b] for a, b in pairs.tolist()]
    return pairs[torch.tensor(same, dtype=torch.bool)]


def _digests(dataset: ImageDataset, places: Tensor) -> dict[int, bytes | None]:
    """A hash of the content of each place; None where there is none."""
    wanted = torch.unique(places).tolist()
    found = map_threads(lambda i: _digest(dataset, wanted[i]), len(wanted), label="comparing copies", show=True)
    return dict(zip(wanted, found, strict=True))


def _digest(dataset: ImageDataset, place: int) -> bytes | None:
    try:
        return hashlib.sha256(dataset.content(place)).digest()
    except UnreadableImageError:
        return None
