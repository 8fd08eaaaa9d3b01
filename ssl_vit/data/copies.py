"""Pictures that are stored byte for byte alike, among pairs that look alike."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ssl_vit.data.parallel import in_threads
from ssl_vit.data.pictures import BrokenPicture, Pictures


def identical(pictures: Pictures, others: Pictures, pairs: Tensor) -> Tensor:
    """Those pairs (P, 2) int64 of places, in `pictures` and in `others`, that have the same content.

    Only the pictures in the pairs are read, each once. What cannot be read is like nothing else.
    """
    first, second = (_digests(*part) for part in ((pictures, pairs[:, 0]), (others, pairs[:, 1])))
    same = [first[a] is not None and first[a] == second[b] for a, b in pairs.tolist()]
    return pairs[torch.tensor(same, dtype=torch.bool)]


def _digests(pictures: Pictures, places: Tensor) -> dict[int, bytes | None]:
    """A hash of the content of each place; None where there is none."""
    wanted = torch.unique(places).tolist()
    found = in_threads(lambda i: _digest(pictures, wanted[i]), len(wanted), label="comparing copies", show=True)
    return dict(zip(wanted, found, strict=True))


def _digest(pictures: Pictures, place: int) -> bytes | None:
    try:
        return hashlib.sha256(pictures.content(place)).digest()
    except BrokenPicture:
        return None
