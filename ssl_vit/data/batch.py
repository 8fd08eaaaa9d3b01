"""The batch that travels from the data loader to the method, with its shapes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Crops of B images, before color augmentation."""

    global_views: Tensor  # (B, G, C, H, W) uint8
    local_views: Tensor  # (B, L, C, h, w) uint8; L may be 0
    label: Tensor  # (B,) int64, -1 where unknown
    index: Tensor  # type: ignore[assignment]  # (B,) int64, into the dataset
    key: Tensor  # (B,) int64, RNG keys of the samples: hashes of (seed, epoch, index)
