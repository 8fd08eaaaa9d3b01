"""Small tensors from the CPU to a device, without the CPU waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; from ordinary memory a GPU would copy only behind all it was told to do before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
