"""Reconstructions of images by a SiT model."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.config.methods import MethodConfig, SiTConfig
from ssl_vit.methods.sit import SiTModel, load_sit_model

__all__ = ["has_reconstruction", "load_sit_model", "reconstruct"]


def has_reconstruction(method: MethodConfig) -> bool:
    """Return whether a run of this method learns to restore images."""
    return isinstance(method, SiTConfig) and method.reconstruction.enabled


def reconstruct(model: SiTModel, images: Tensor) -> Tensor:
    """Restore normalized corrupted images (B, C, S, S)."""
    with torch.no_grad():
        _, outputs = model(images.to(model.backbone.device))
    restored: Tensor = outputs["reconstruction"]
    return restored
