"""Statistics of features on the unit sphere that need no labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.runtime.device import upcast


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Compute √D · mean over dimensions of the standard deviation of the L2-normalized features (B, D).

    1 for features uniform on the sphere, 0 if all are equal (SimSiam, arXiv 2011.10566, section 4.1).
    """
    unit = F.normalize(upcast(features), dim=-1)
    return unit.std(dim=0).mean() * math.sqrt(features.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Compute the exponential of the entropy of the normalized singular values of (B, D): from 1 to min(B, D).

    RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 2), not centered; comparable only within one run. NaN if a
    feature is not finite, for which the decomposition would raise an error.
    """
    if not features.isfinite().all():
        return features.new_full((), math.nan, dtype=torch.float32)
    singular = torch.linalg.svdvals(upcast(features))
    p = singular / singular.sum() + 1e-7
    return torch.exp(-(p * p.log()).sum())


@torch.no_grad()
def alignment(one: Tensor, other: Tensor) -> Tensor:
    """Compute E |z - z⁺|² of the L2-normalized features (B, D) of two views: 0 if they are equal, at most 4.

    Wang & Isola 2020 (arXiv 2005.10242), section 4.1 with α = 2.
    """
    difference = F.normalize(upcast(one), dim=-1) - F.normalize(upcast(other), dim=-1)
    return difference.square().sum(dim=-1).mean()


@torch.no_grad()
def uniformity(features: Tensor) -> Tensor:
    """Compute ln E exp(-2 |z - z'|²) over all pairs of the L2-normalized features (B, D), B of 2 and more.

    0 if all are equal, about -4 for features uniform on a sphere of many dimensions (Wang & Isola 2020, arXiv
    2005.10242, section 4.1 with t = 2).
    """
    unit = F.normalize(upcast(features), dim=-1)
    squared = torch.pdist(unit).square()  # (B·(B-1)/2,)
    return torch.expm1(-2 * squared).mean().log1p()  # precise where all features are nearly equal


@torch.no_grad()
def neighbor_stability(before: Tensor, after: Tensor) -> Tensor:
    """Compute the mean over images of |A ∩ B| / k, where A and B (N, k) are the image's k nearest others in two models.

    1 if all are kept; k / (N - 1) by chance. The mutual kNN metric of Huh et al. 2024 (arXiv 2405.07987).
    """
    return (before[:, :, None] == after[:, None, :]).any(dim=2).float().mean()
