"""Losses that hold a model to the one that its training started from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_loss(patches: Tensor, start: Tensor) -> Tensor:
    """Compute the mean squared difference of the cosine similarities between the patches of each image.

    mean over entries of (X̂ X̂ᵀ - Ŷ Ŷᵀ)², with rows of length 1, as the Gram anchoring of DINOv3 (Siméoni et al. 2025,
    arXiv 2508.10104, equation 2), whose sum is divided by the entries as in its code.

    Args:
        patches: Patch tokens (B, N, D) after the final norm.
        start: Those of the start model for the same images.
    """
    ours, theirs = (F.normalize(tokens.float(), dim=-1) for tokens in (patches, start))
    with torch.autocast(patches.device.type, enabled=False):
        return F.mse_loss(ours @ ours.mT, theirs @ theirs.mT)


def feature_loss(cls: Tensor, patches: Tensor, start_cls: Tensor, start_patches: Tensor) -> Tensor:
    """Compute 1 - cosine to the start model's tokens, the mean of that of [CLS] (B, D) and of the patches (B, N, D)."""
    pairs = ((cls, start_cls), (patches, start_patches))
    distances = [1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1).mean() for ours, theirs in pairs]
    return torch.stack(distances).mean()


def l2sp_loss(parameters: Iterable[Tensor], start: Iterable[Tensor]) -> Tensor:
    """Compute ½ ‖w - w₀‖² over all parameters (L2-SP, Li et al. 2018, arXiv 1802.01483, equation 2)."""
    return (
        0.5
        * torch.stack([(ours - theirs).square().sum() for ours, theirs in zip(parameters, start, strict=True)]).sum()
    )
