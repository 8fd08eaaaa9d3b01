"""Ridge regression onto the classes: closed form, all penalties from one eigendecomposition, exact leave-one-out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.evaluation.classification.linear_classifier import LinearClassifier, Standardizer
from ssl_vit.runtime.device import upcast


class RidgeFit(NamedTuple):
    """The probe of one penalty."""

    l2: float
    probe: LinearClassifier  # logits(features) -> (N, C): 1 for its class, -1 for the others, as far as features tell
    left_out: Tensor  # (N, C) float64: scores of each image by the probe fitted without it; NaN if it is the only one


class LeaveOneOut(NamedTuple):
    """How the images are answered by the probes that were fitted without them."""

    accuracy: float  # in [0, 1]
    error: float  # mean over the images of the squared distance to the targets


class _Problem(NamedTuple):
    """What to solve for, in float64."""

    features: Tensor  # (N, D), of any floating type
    standard: Standardizer
    targets: Tensor  # (N, C), of mean 0
    l2: Tensor  # (penalties,)

    def rows(self) -> Iterator[Tensor]:
        """The features standardized, some thousand rows at a time."""
        return self.standard.rows(self.features)


def ridge_path(features: Tensor, labels: Tensor, *, classes: int, l2: Sequence[float]) -> Iterator[RidgeFit]:
    """Least squares onto the classes for each penalty, from strong to weak, with exact leave-one-out.

    Minimises 1 / (2 N) Σ |yᵢ - Wᵀzᵢ - b|² + l2 / 2 |W|² over weights W and a free bias b. yᵢ is 1 for the class of the
    image and -1 for the others, zᵢ its features minus their mean over their standard deviation (of all N images).

    Leave-one-out holds fixed the standardization, the targets' coding and the weight N · l2 of the penalty beside the
    sum of squares; W and b are fitted anew. No fit is needed for it: with the hat matrix H of the fit, bias included,
    the image's score is yᵢ - (yᵢ - ŷᵢ) / (1 - hᵢᵢ) (Allen 1974). All is computed in float64, from the eigenvectors
    of ZᵀZ (D, D) or, where there are fewer images than features, of ZZᵀ (N, N).

    Args:
        features: (N, D) as they come, any floating type; constant ones get no say.
        labels: (N,) int64 in [0, classes).
        classes: Number of classes C; those without images score -1.
        l2: Penalties above 0, in any order.
    """
    standard = Standardizer.of(features)
    targets = (2.0 * F.one_hot(labels, classes) - 1).double()  # (N, C)
    bias = targets.mean(dim=0)
    penalties = torch.tensor(sorted(l2, reverse=True), dtype=torch.float64, device=features.device)
    problem = _Problem(features, standard, targets - bias, penalties)
    solve = _by_features if features.shape[1] <= len(features) else _by_images
    dtype = upcast(features).dtype
    for penalty, (weight, missed) in zip(penalties.tolist(), solve(problem), strict=True):
        parts = (*standard, weight, bias)
        yield RidgeFit(penalty, LinearClassifier(*(part.to(dtype) for part in parts)), targets - missed)


def left_out_score(fit: RidgeFit, labels: Tensor) -> LeaveOneOut:
    """Accuracy and squared error of a fit's left-out scores."""
    right = fit.left_out.argmax(dim=1) == labels
    # |s - y|² with y = -1 but for 1 in the image's class
    own = fit.left_out.gather(1, labels[:, None]).squeeze(1)
    error = (fit.left_out + 1).square().sum(dim=1) - 4 * own
    return LeaveOneOut(float(right.double().mean()), float(error.mean()))


def selection_score(score: LeaveOneOut, labels: Tensor) -> tuple[float, float]:
    """What to choose a penalty by, the larger the better: accuracy, then the error.

    Where a class has one image the error alone: without that image its class is unknown.
    """
    lonely = bool((torch.bincount(labels) == 1).any())
    return 0.0 if lonely else score.accuracy, -score.error


def best_ridge(fits: Iterable[RidgeFit], labels: Tensor) -> RidgeFit:
    """The fit of largest merit; of equal ones the first."""
    return max(fits, key=lambda fit: selection_score(left_out_score(fit, labels), labels))


def _by_features(problem: _Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (D, C) for each penalty, and by how much left-out scores miss the targets (N, C); from ZᵀZ (D, D)."""
    (count, dim), targets, l2 = problem.features.shape, problem.targets, problem.l2
    products, coded = targets.new_zeros(dim, dim), targets.new_zeros(dim, targets.shape[1])
    done = 0
    for rows in problem.rows():
        products += rows.T @ rows
        coded += rows.T @ targets[done : done + len(rows)]
        done += len(rows)
    variance, axes = torch.linalg.eigh(products / count)
    variance, coded = variance.clamp(min=0), axes.T @ coded / count
    damped = 1 / (variance[:, None] + l2)  # (D, penalties)
    free = 1 - 1 / count - torch.cat([(rows @ axes).square_() @ damped for rows in problem.rows()]) / count  # 1 - hᵢᵢ
    # Less than this no image has; where it stands alone, the difference is but rounding errors.
    free = torch.maximum(free, (1 - 1 / count) * l2 / (variance[-1] + l2))
    for place in range(len(l2)):
        weight = axes @ (coded * damped[:, place, None])
        residual = targets - torch.cat([rows @ weight for rows in problem.rows()])
        yield weight, residual / free[:, place, None]


def _by_images(problem: _Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """The same from ZZᵀ (N, N).

    With its eigenvectors U without their means, I - H is l2 · U (variance + l2)⁻¹ Uᵀ: residuals and 1 - hᵢᵢ are sums
    that lose nothing to rounding however small they are.
    """
    z, targets = torch.cat(list(problem.rows())), problem.targets
    variance, vectors = torch.linalg.eigh(z @ z.T / len(z))
    variance, vectors = variance.clamp(min=0), vectors - vectors.mean(dim=0)
    coded = vectors.T @ targets
    for l2 in problem.l2:
        damped = 1 / (variance + l2)
        residual = vectors @ (coded * damped[:, None])  # over l2, and so is what it is divided by
        yield z.T @ residual / len(z), residual / (vectors.square() @ damped)[:, None]
