"""What losses and norms compute in, whatever the network computes in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is in float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
