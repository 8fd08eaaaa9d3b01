"""Ridge regression onto the classes in closed form, with exact leave-one-out; one eigendecomposition for all l2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.evaluation.classification.linear_classifier import LinearClassifier, Standardizer
from ssl_vit.runtime.device import upcast


class RidgeFit(NamedTuple):
    """The classifier of one penalty."""

    l2: float
    probe: LinearClassifier  # its logits (N, C) approximate 1 for the image's class and -1 for the others
    loo_scores: Tensor  # (N, C) float64: scores of each image by the classifier fitted without it; NaN for N = 1


class LeaveOneOut(NamedTuple):
    """Leave-one-out metrics of a fit."""

    accuracy: float  # in [0, 1]
    error: float  # mean squared distance to the targets


def ridge_path(features: Tensor, labels: Tensor, *, classes: int, l2: Sequence[float]) -> Iterator[RidgeFit]:
    """Fit least squares onto the classes for each penalty, from strong to weak, with exact leave-one-out.

    Minimizes 1 / (2 N) Σ |yᵢ - Wᵀzᵢ - b|² + l2 / 2 |W|² over weights W and a free bias b. yᵢ is 1 for the class of the
    image and -1 for the others, zᵢ its features minus their mean over their standard deviation (of all N images).

    Leave-one-out keeps the standardization, the target coding and the weight N · l2 of the penalty relative to the sum
    of squares; W and b are refitted. No refit is computed: with the hat matrix H of the fit, bias included, the
    image's score is yᵢ - (yᵢ - ŷᵢ) / (1 - hᵢᵢ) (Allen 1974). Everything is computed in float64, from the eigenvectors
    of ZᵀZ (D, D) or, for fewer images than features, of ZZᵀ (N, N).

    Features (N, D) are not standardized, and of any floating dtype; constant ones get weight 0. Labels are (N,) int64
    in [0, classes); classes without images score -1. Penalties are above 0, in any order.
    """
    standard = Standardizer.of(features)
    targets = (2.0 * F.one_hot(labels, classes) - 1).double()  # (N, C)
    bias = targets.mean(dim=0)
    penalties = torch.tensor(sorted(l2, reverse=True), dtype=torch.float64, device=features.device)
    solve = _by_features if features.shape[1] <= len(features) else _by_images
    solutions = solve(features, standard, targets - bias, penalties)
    dtype = upcast(features).dtype
    for penalty, (weight, missed) in zip(penalties.tolist(), solutions, strict=True):
        parts = (*standard, weight, bias)
        yield RidgeFit(penalty, LinearClassifier(*(part.to(dtype) for part in parts)), targets - missed)


def leave_one_out(fit: RidgeFit, labels: Tensor) -> LeaveOneOut:
    """Compute the leave-one-out accuracy and squared error of a fit."""
    right = fit.loo_scores.argmax(dim=1) == labels
    # |s - y|² with y = 1 for the image's class and -1 for the others
    own = fit.loo_scores.gather(1, labels[:, None]).squeeze(1)
    error = (fit.loo_scores + 1).square().sum(dim=1) - 4 * own
    return LeaveOneOut(float(right.double().mean()), float(error.mean()))


def selection_score(score: LeaveOneOut, labels: Tensor) -> tuple[float, float]:
    """Return the key by which a penalty is selected, the larger the better: the accuracy, then the negative error.

    If a class has a single image, only the error counts: without that image its class is unknown.
    """
    single = bool((torch.bincount(labels) == 1).any())
    return 0.0 if single else score.accuracy, -score.error


def best_ridge(fits: Iterable[RidgeFit], labels: Tensor) -> RidgeFit:
    """Return the fit with the best selection score; among equals the first."""
    return max(fits, key=lambda fit: selection_score(leave_one_out(fit, labels), labels))


def _by_features(
    features: Tensor, standard: Standardizer, targets: Tensor, l2: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weights (D, C) and leave-one-out residuals (N, C) for each penalty, from ZᵀZ (D, D).

    Features are (N, D), targets (N, C) of mean 0, l2 (penalties,); everything is float64 but the features.
    """
    count, dim = features.shape
    products, coded = targets.new_zeros(dim, dim), targets.new_zeros(dim, targets.shape[1])
    done = 0
    for rows in standard.rows(features):
        products += rows.T @ rows
        coded += rows.T @ targets[done : done + len(rows)]
        done += len(rows)
    variance, axes = torch.linalg.eigh(products / count)
    variance, coded = variance.clamp(min=0), axes.T @ coded / count
    damped = 1 / (variance[:, None] + l2)  # (D, penalties)
    leverage = torch.cat([(rows @ axes).square_() @ damped for rows in standard.rows(features)]) / count
    free = 1 - 1 / count - leverage  # 1 - hᵢᵢ
    # The lower bound of 1 - hᵢᵢ: below it the difference consists of rounding errors.
    free = torch.maximum(free, (1 - 1 / count) * l2 / (variance[-1] + l2))
    for column in range(len(l2)):
        weight = axes @ (coded * damped[:, column, None])
        residual = targets - torch.cat([rows @ weight for rows in standard.rows(features)])
        yield weight, residual / free[:, column, None]


def _by_images(
    features: Tensor, standard: Standardizer, targets: Tensor, l2: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same from ZZᵀ (N, N).

    With its eigenvectors U without their means, I - H is l2 · U (variance + l2)⁻¹ Uᵀ: residuals and 1 - hᵢᵢ are sums
    without cancellation, exact however small they are.
    """
    z = torch.cat(list(standard.rows(features)))
    variance, vectors = torch.linalg.eigh(z @ z.T / len(z))
    variance, vectors = variance.clamp(min=0), vectors - vectors.mean(dim=0)
    coded = vectors.T @ targets
    for penalty in l2:
        damped = 1 / (variance + penalty)
        residual = vectors @ (coded * damped[:, None])  # divided by l2, as is its divisor below
        yield z.T @ residual / len(z), residual / (vectors.square() @ damped)[:, None]
