"""Linear probe on frozen features, chosen on held-out training pictures; the test pictures are looked at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ssl_vit.errors import UserError
from ssl_vit.evaluation.features import Features
from ssl_vit.evaluation.knn import rank_of
from ssl_vit.evaluation.search import full_precision

_PATH_TOLERANCE, _FINAL_TOLERANCE = 1e-6, 1e-8  # change of the loss per step at which the solver stops
_MOST_STEPS = 500


class Variant(NamedTuple):
    """Which of the features a probe sees."""

    blocks: int  # [CLS] of so many last blocks, concatenated
    patch_mean: bool  # and the mean patch token of the last one

    def of(self, features: Features) -> Tensor:
        """The chosen features (N, D') float32."""
        cls = features.cls[:, -self.blocks :].flatten(1)
        return (torch.cat([cls, features.patch_mean], dim=1) if self.patch_mean else cls).float()

    def __str__(self) -> str:
        blocks = "last block" if self.blocks == 1 else f"last {self.blocks} blocks"
        return f"[CLS] of the {blocks}{' + patch mean' if self.patch_mean else ''}"


class Trial(NamedTuple):
    """One probe of the choice, judged by the held-out pictures."""

    variant: Variant
    l2: float
    accuracy: float  # in [0, 1]
    loss: float  # mean cross-entropy


class Space(NamedTuple):
    """Standardised features of N pictures along their R principal axes, in which probes are sought."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,): 1 / standard deviation; 0 where a feature is constant
    axes: Tensor  # (D, R), orthonormal columns
    variance: Tensor  # (R,), along the axes
    x: Tensor  # (R, N): in this layout both products of a solver's step run along rows


class Probe(NamedTuple):
    """A linear classifier of standardised features."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,): 1 / standard deviation; 0 where a feature is constant
    weight: Tensor  # (D, C)
    bias: Tensor  # (C,)

    def logits(self, features: Tensor) -> Tensor:
        """Scores (N, C) of features (N, D)."""
        return (features - self.mean) * self.scale @ self.weight + self.bias


class LinearResult(NamedTuple):
    """How the chosen probe classified Q test pictures."""

    ranks: Tensor  # (Q,) int64: how many classes came before the true one; 0 is right
    predicted: Tensor  # (Q,) int64: the labels of highest score
    chosen: Trial
    trials: list[Trial]
    warnings: list[str]


def linear_probe(
    train: Features,
    test: Features,
    *,
    variants: Sequence[Variant],
    l2: Sequence[float],
    held_out: float,
    seed: int,
    device: torch.device,
) -> LinearResult:
    """Choose features and penalty on a held-out share of the training pictures, refit on all of them, test once.

    Args:
        train: The pictures to learn from.
        test: The pictures to be measured on; nothing is chosen by them.
        variants: Features to choose from.
        l2: Penalties to choose from.
        held_out: Share of the training pictures, per class, that the choice is made on.
        seed: Of the held-out split.
        device: Where to compute.

    Raises:
        UserError: No class has two training pictures, so that none can be held out.
    """
    classes, labels = torch.unique(train.labels, return_inverse=True)
    held = stratified(labels, held_out, seed=seed)
    if not held.any():
        raise UserError("no class has two training pictures: nothing can be held out to choose a probe on")
    labels, held = labels.to(device), held.to(device)
    trials: list[Trial] = []
    with full_precision(), tqdm(total=len(variants) * len(l2), desc="linear probe", unit="", disable=None) as bar:
        for variant in variants:
            features = variant.of(train).to(device)
            space = standard_space(features)
            for penalty, probe in probe_path(space, labels, classes=len(classes), l2=l2, pictures=~held):
                trials.append(_judged(variant, penalty, probe.logits(features[held]), labels[held]))
                bar.update()
            if (best := max(trials, key=_merit)).variant == variant:
                chosen, its_space = best, space
        path = probe_path(its_space, labels, classes=len(classes), l2=[chosen.l2], tolerance=_FINAL_TOLERANCE)
        _, probe = next(path)
        logits = probe.logits(chosen.variant.of(test).to(device)).cpu()
    return LinearResult(
        _ranks(logits, classes, test.labels), classes[logits.argmax(dim=1)], chosen, trials, _warnings(chosen, l2)
    )


def stratified(labels: Tensor, share: float, *, seed: int) -> Tensor:
    """A random share of each class as a mask (N,) bool: at least one picture and never all; none of a single one."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


def standard_space(features: Tensor) -> Space:
    """The space of features (N, D) float32."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    scale = torch.where(std > 1e-6, 1 / std, 0)
    x = (features - mean) * scale
    count, dim = x.shape
    if dim <= count:
        variance, axes = torch.linalg.eigh((x.T @ x).double() / count)
    else:  # the few pictures span all that a probe can use, and their products tell the axes
        products, rows = torch.linalg.eigh(x.double() @ x.T.double())
        spanned = products > 1e-10 * products[-1]
        variance, axes = products[spanned] / count, x.T.double() @ (rows[:, spanned] / products[spanned].sqrt())
    axes = axes.float()
    return Space(mean, scale, axes, variance.clamp(min=0).float(), axes.T @ x.T)


def probe_path(
    space: Space,
    labels: Tensor,
    *,
    classes: int,
    l2: Sequence[float],
    pictures: Tensor | None = None,
    tolerance: float = _PATH_TOLERANCE,
) -> Iterator[tuple[float, Probe]]:
    """Multinomial logistic regression for each penalty, from strong to weak, each started from the one before.

    Minimises mean cross-entropy + l2 / 2 · |W|² over the weights W of standardised features and a free bias, by
    full-batch L-BFGS. The solver works on the principal axes, each divided by the square root of the loss's curvature
    at W = 0, which is variance / classes + l2: the minimum is the same, the steps to it are five times fewer.

    Args:
        space: To learn in.
        labels: Of its N pictures, int64 in [0, classes).
        classes: Number of classes C.
        l2: Penalties, in any order.
        pictures: A mask (N,) of those to learn from; None: all.
        tolerance: Change of the loss per step at which to stop.
    """
    x = space.x
    if pictures is not None:
        x, labels = x[:, pictures], labels[pictures]
    weight, bias = x.new_zeros(classes, len(x)), x.new_zeros(classes, 1)
    for penalty in sorted(l2, reverse=True):
        step = (space.variance / classes + penalty).rsqrt()
        weight, bias = _minimise(x, labels, step, penalty, weight, bias, tolerance)
        yield penalty, Probe(space.mean, space.scale, space.axes @ weight.T, bias.squeeze(1))


def _minimise(
    x: Tensor, labels: Tensor, step: Tensor, l2: float, weight: Tensor, bias: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Weights (C, D) and bias (C, 1) of least loss on x (D, N), searched in the coordinates weight / step (D,)."""
    scaled, bias = (weight / step).requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [scaled, bias],
        max_iter=_MOST_STEPS,
        tolerance_grad=0,
        tolerance_change=tolerance,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        weight = scaled * step
        value = F.cross_entropy((weight @ x + bias).T, labels) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return (scaled * step).detach(), bias.detach()


def _judged(variant: Variant, l2: float, logits: Tensor, labels: Tensor) -> Trial:
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return Trial(variant, l2, float(accuracy), float(F.cross_entropy(logits, labels)))


def _merit(trial: Trial) -> tuple[float, float]:
    """The more right the better; of equals the one with the lower loss."""
    return trial.accuracy, -trial.loss


def _ranks(logits: Tensor, classes: Tensor, truth: Tensor) -> Tensor:
    """Ranks (Q,) of the true classes; a class without training pictures comes last."""
    known = torch.isin(truth, classes)
    ranks = torch.full_like(truth, len(classes))
    ranks[known] = rank_of(torch.searchsorted(classes, truth[known]), logits[known])
    return ranks


def _warnings(chosen: Trial, l2: Sequence[float]) -> list[str]:
    for end, extreme in (("smallest", min(l2)), ("largest", max(l2))):
        if chosen.l2 == extreme and len(set(l2)) > 1:
            return [f"the chosen l2 = {extreme:g} is the {end} that was offered: widen l2"]
    return []
