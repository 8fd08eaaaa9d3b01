"""Multinomial logistic regression along a path of penalties."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.evaluation.classification.linear_classifier import LinearClassifier, Standardizer

PATH_TOLERANCE, FINAL_TOLERANCE = 1e-7, 1e-8  # change of the loss per step at which the solver stops
_MAX_STEPS = 500
_IGNORED = -100  # label that `F.cross_entropy` ignores


class StandardizedSpace(NamedTuple):
    """Standardized features of N images along their R principal axes, in which the solver works."""

    standard: Standardizer  # float32
    axes: Tensor  # (D, R), orthonormal columns
    variance: Tensor  # (R,), along the axes
    x: Tensor  # (R, N): in this layout both products of a solver step run along rows


def standard_space(features: Tensor) -> StandardizedSpace:
    """Compute the standardized space of features (N, D), of any floating dtype, in float32."""
    count, dim = features.shape
    standard = Standardizer.of(features).to(torch.float32)
    if dim <= count:
        products = features.new_zeros(dim, dim, dtype=torch.float64)
        for rows in standard.rows(features):
            products += rows.T @ rows
        variance, axes = torch.linalg.eigh(products / count)
    else:  # the images span all directions that a classifier can use; compute the axes from their products
        x = torch.cat(list(standard.rows(features))).double()
        products, vectors = torch.linalg.eigh(x @ x.T)
        spanned = products > 1e-10 * products[-1]
        variance, axes = products[spanned] / count, x.T @ (vectors[:, spanned] / products[spanned].sqrt())
    axes = axes.float()
    x = axes.new_empty(axes.shape[1], count)
    done = 0
    for rows in standard.rows(features):
        torch.mm(axes.T, rows.T, out=x[:, done : done + len(rows)])
        done += len(rows)
    return StandardizedSpace(standard, axes, variance.clamp(min=0).float(), x)


def logistic_path(
    space: StandardizedSpace,
    labels: Tensor,
    *,
    classes: int,
    l2: Sequence[float],
    mask: Tensor | None = None,
    tolerance: float = PATH_TOLERANCE,
) -> Iterator[tuple[float, LinearClassifier]]:
    """Fit multinomial logistic regression for each penalty, from strong to weak, each starting from the previous one.

    Minimizes mean cross-entropy + l2 / 2 · |W|² over the weights W of standardized features and a free bias, by
    full-batch L-BFGS. The solver works on the principal axes, each divided by the square root of the loss's curvature
    at W = 0, which is variance / classes + l2: the minimum is the same, with five times fewer steps. It stops when a
    step changes the loss by less than `tolerance`.

    Labels are (N,) int64 in [0, classes); the mask (N,) selects the images to train on, by default all.
    """
    x = space.x
    if mask is not None:
        labels = labels.masked_fill(~mask, _IGNORED)
    weight, bias = x.new_zeros(classes, len(x)), x.new_zeros(classes, 1)
    for penalty in sorted(l2, reverse=True):
        step = (space.variance / classes + penalty).rsqrt()
        weight, bias = _minimize(x, labels, step, penalty, weight, bias, tolerance)
        yield penalty, LinearClassifier(*space.standard, space.axes @ weight.T, bias.squeeze(1))


def _minimize(
    x: Tensor, labels: Tensor, step: Tensor, l2: float, weight: Tensor, bias: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Find the weights (C, D) and bias (C, 1) of least loss on x (D, N), in the coordinates weight / step (D,)."""
    scaled, bias = (weight / step).requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [scaled, bias],
        max_iter=_MAX_STEPS,
        tolerance_grad=0,
        tolerance_change=tolerance,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        weight = scaled * step
        value = F.cross_entropy((weight @ x + bias).T, labels, ignore_index=_IGNORED) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return (scaled * step).detach(), bias.detach()
