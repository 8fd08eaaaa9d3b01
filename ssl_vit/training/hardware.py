"""What the machine at hand is good at: device, number format, attention form."""

from __future__ import annotations

import shutil
from typing import Literal

import torch

from ssl_vit.errors import UserError


def best_device(accelerator: Literal["auto", "cpu", "gpu"] = "auto") -> torch.device:
    """The GPU where there is one, else the CPU.

    Raises:
        UserError: A GPU was asked for and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: torch finds no GPU here; use trainer.accelerator=cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes it natively, else None: stay in float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    native = torch.cpu.get_capabilities()
    return torch.bfloat16 if native.get("avx512_bf16") or native.get("amx_bf16") or native.get("sve_bf16") else None


def fused_attention_pays(device: torch.device) -> bool:
    """On GPUs; under bf16 autocast on CPUs the plain matrix form trains small ViTs about twice as fast.

    It takes their features about 1.2 times as fast, too (tools/feature_figures.py).
    """
    return device.type == "cuda"


def compiling_pays(device: torch.device) -> bool:
    """On GPUs, if there is a C compiler, which torch.compile needs; on CPUs it gains a tenth after minutes."""
    return device.type == "cuda" and any(map(shutil.which, ("cc", "gcc", "clang")))
