"""The reconstruction loss of SiT: L1 to the uncorrupted view."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.distributed import all_sum, world_size
from ssl_vit.precision import at_least_float32


def l1(reconstruction: Tensor, clean: Tensor, corrupted: Tensor | None = None) -> Tensor:
    """Mean absolute difference over all pixels, or over the corrupted ones of all processes.

    Args:
        reconstruction: (B, C, H, W).
        clean: (B, C, H, W), the target.
        corrupted: (B, 1, H, W) bool; None counts every pixel.

    The corrupted pixels are counted over all processes, so that processes with more of them weigh more and the mean
    over processes equals the mean of one process with the whole batch.
    """
    difference = (at_least_float32(reconstruction) - at_least_float32(clean)).abs()
    if corrupted is None:
        return difference.mean()
    count = all_sum(corrupted.sum()) * clean.shape[1] / world_size()
    return (difference * corrupted).sum() / torch.clamp(count, min=1)
