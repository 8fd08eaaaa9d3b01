"""The reconstruction loss of SiT: L1 to the uncorrupted view."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.runtime.device import upcast
from ssl_vit.runtime.distributed import all_reduce_sum, world_size


def reconstruction_l1(reconstruction: Tensor, clean: Tensor, corrupted: Tensor | None = None) -> Tensor:
    """Mean absolute difference over all pixels, or over the corrupted ones of all processes.

    Args:
        reconstruction: (B, C, H, W).
        clean: (B, C, H, W), the target.
        corrupted: (B, 1, H, W) bool; None counts every pixel.

    The corrupted pixels are counted over all processes, so that processes with more of them weigh more and the mean
    over processes equals the mean of one process with the whole batch.
    """
    difference = (upcast(reconstruction) - upcast(clean)).abs()
    if corrupted is None:
        return difference.mean()
    count = all_reduce_sum(corrupted.sum()) * clean.shape[1] / world_size()
    return (difference * corrupted).sum() / torch.clamp(count, min=1)
