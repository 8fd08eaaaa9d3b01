"""L1 distance of reconstructions to the uncorrupted images, the reconstruction loss of SiT."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.runtime.device import upcast
from ssl_vit.runtime.distributed import all_reduce_sum, world_size


def reconstruction_l1(reconstruction: Tensor, clean: Tensor, corrupted: Tensor | None = None) -> Tensor:
    """Compute the mean absolute difference over all pixels, or over the corrupted pixels of all processes.

    Args:
        reconstruction: (B, C, H, W).
        clean: (B, C, H, W), the target.
        corrupted: (B, 1, H, W) bool; None: all pixels.

    The sum is divided by the number of corrupted pixels per process, averaged over processes: the mean over processes
    then equals that of one process with the whole batch.
    """
    difference = (upcast(reconstruction) - upcast(clean)).abs()
    if corrupted is None:
        return difference.mean()
    count = all_reduce_sum(corrupted.sum()) * clean.shape[1] / world_size()
    return (difference * corrupted).sum() / torch.clamp(count, min=1)
