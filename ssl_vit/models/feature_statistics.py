"""How features lie on the sphere, without labels: whether images are told apart, and views of one are not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.runtime.device import upcast


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """√D · mean over dimensions of the standard deviation of the L2-normalized features (B, D).

    1 for features spread evenly over the sphere, 0 when all are the same (SimSiam, arXiv 2011.10566, section 4.1).
    """
    unit = F.normalize(upcast(features), dim=-1)
    return unit.std(dim=0).mean() * math.sqrt(features.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """The exponential of the entropy of the normalized singular values of (B, D): between 1 and min(B, D).

    RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 2), uncenterd; compare it only within one run. NaN where a
    feature is not finite: the decomposition would raise.
    """
    if not features.isfinite().all():
        return features.new_full((), math.nan, dtype=torch.float32)
    singular = torch.linalg.svdvals(upcast(features))
    share = singular / singular.sum() + 1e-7
    return torch.exp(-(share * share.log()).sum())


@torch.no_grad()
def alignment(one: Tensor, other: Tensor) -> Tensor:
    """E |z - z⁺|² of the L2-normalized features (B, D) of two views: 0 where an image's are the same, and 4 at most.

    Wang & Isola 2020 (arXiv 2005.10242), section 4.1 with α = 2.
    """
    difference = F.normalize(upcast(one), dim=-1) - F.normalize(upcast(other), dim=-1)
    return difference.square().sum(dim=-1).mean()


@torch.no_grad()
def uniformity(features: Tensor) -> Tensor:
    """The logarithm of E exp(-2 |z - z'|²) over all pairs of the L2-normalized features (B, D), B of 2 and more.

    0 when all are the same, about -4 when spread evenly over a sphere of many dimensions (Wang & Isola 2020, arXiv
    2005.10242, section 4.1 with t = 2).
    """
    unit = F.normalize(upcast(features), dim=-1)
    squared = torch.pdist(unit).square()  # (B·(B-1)/2,)
    return torch.expm1(-2 * squared).mean().log1p()  # of exp and log little would be left where all are nearly the same
