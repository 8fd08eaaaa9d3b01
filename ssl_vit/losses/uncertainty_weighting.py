"""Weighted sums of losses: learned uncertainty weights or fixed ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UncertaintyWeights(nn.Module):
    """Learned weights from one log-variance s per loss (SiT v1.1; Kendall et al. 2018, arXiv 1705.07115).

    total = Σ over cross-entropies of e^{-s} L + s/2, plus for the L1 reconstruction e^{-s/2} L + s/2, the negative
    log-likelihood of a Laplace distribution of width e^{s/2}. s starts at 1 and is kept within [-4, 4]. The total may
    be negative and its scale changes, so that only the losses themselves are comparable.
    """

    LIMIT = 4.0

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.s = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in names})

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """Compute the weighted sum () of scalar losses by name."""
        terms = [self.weight(name) * loss + self._bounded(name) / 2 for name, loss in losses.items()]
        return torch.stack(terms).sum()

    def weight(self, name: str) -> Tensor:
        """Compute the factor () of a loss."""
        return torch.exp(-self._bounded(name) / (2 if name == "reconstruction" else 1))

    def _bounded(self, name: str) -> Tensor:
        s: Tensor = self.s[name].squeeze()
        bounded = s.clamp(-self.LIMIT, self.LIMIT)
        return s + (bounded - s).detach()  # with a gradient beyond the limit, so that s can return


class FixedWeights(nn.Module):
    """Sum Σ w L with given weights."""

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """Compute the weighted sum () of scalar losses by name."""
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
