"""Linear probe on frozen features, selected on training images alone; the test images are evaluated once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.evaluation.classification.linear_classifier import (
    FeatureVariant,
    LinearClassifier,
    label_ranks,
    stratified,
)
from ssl_vit.evaluation.classification.logistic_regression import FINAL_TOLERANCE, logistic_path, standard_space
from ssl_vit.evaluation.classification.nearest_neighbors import full_precision
from ssl_vit.evaluation.classification.ridge_regression import leave_one_out, ridge_path, selection_score
from ssl_vit.evaluation.classification.sgd_classifiers import MOMENTUM, Head, Schedule, train_heads
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar


class Candidate(NamedTuple):
    """A choice of features and settings, evaluated on images that it was not fitted to."""

    variant: FeatureVariant
    settings: Mapping[str, float]  # by config key
    accuracy: float  # in [0, 1]
    loss: float  # mean cross-entropy, for ridge the squared error; infinite if the training diverged

    @property
    def rank(self) -> tuple[float, float]:
        """The key by which a candidate is selected, the larger the better: the accuracy, then the lower loss."""
        return self.accuracy, -self.loss


class ProbeData(NamedTuple):
    """The N training images."""

    features: Features
    labels: Tensor  # (N,) int64 in [0, classes), on the device
    classes: int
    device: torch.device

    def of(self, variant: FeatureVariant) -> Tensor:
        """Return the features (N, D) float32 of a variant, on the device."""
        return _check_finite(variant.of(self.features)).to(self.device)


Selected = tuple[LinearClassifier, Candidate, list[Candidate]]  # probe fitted to all images, its settings, all others


class LinearResult(NamedTuple):
    """The classification of Q test images by the selected probe."""

    ranks: Tensor  # (Q,) int64: number of classes ranked before the true one; 0 is right
    predicted: Tensor  # (Q,) int64: labels with the highest score
    probe: LinearClassifier  # on the CPU
    classes: Tensor  # (C,) int64: labels of its scores
    chosen: Candidate
    candidates: list[Candidate]
    warnings: list[str]


class Logistic(NamedTuple):
    """Multinomial logistic regression by L-BFGS, selected on a val split."""

    l2: Sequence[float]
    val_fraction: float
    seed: int  # of the val split

    def select(self, data: ProbeData, variants: Sequence[FeatureVariant]) -> Selected:
        """Evaluate on the val split, then fit the best to all."""
        val = _val_mask(data, self.val_fraction, self.seed)
        labels, classes = data.labels, data.classes
        candidates: list[Candidate] = []
        with progress_bar(total=len(variants) * len(self.l2), desc="linear probe", unit="") as bar:
            for variant in variants:
                features = data.of(variant)
                space, val_features = standard_space(features), features[val]
                del features
                for l2, probe in logistic_path(space, labels, classes=classes, l2=self.l2, mask=~val):
                    candidates.append(_evaluate(variant, {"l2": l2}, probe.logits(val_features), labels[val]))
                    bar.update()
                if (best := max(candidates, key=attrgetter("rank"))).variant == variant:
                    chosen, chosen_space = best, space
        best_l2 = [chosen.settings["l2"]]
        _, probe = next(logistic_path(chosen_space, labels, classes=classes, l2=best_l2, tolerance=FINAL_TOLERANCE))
        return probe, chosen, candidates

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return everything that determines the numbers, and the images of the selection."""
        protocol = {
            "solver": "logistic regression",
            "objective": "mean cross-entropy + l2 / 2 |W|^2, bias not penalized",
            "l2": sorted(set(self.l2)),
        }
        return protocol, _val_selection(self.val_fraction, self.seed)


class Ridge(NamedTuple):
    """Ridge regression in closed form, selected by exact leave-one-out, so that nothing is fitted twice."""

    l2: Sequence[float]

    def select(self, data: ProbeData, variants: Sequence[FeatureVariant]) -> Selected:
        """Evaluate each image by the probe fitted without it."""
        candidates: list[Candidate] = []
        best: tuple[float, float] | None = None
        for variant in progress_bar(variants, desc="ridge probe", unit=""):
            for fit in ridge_path(data.of(variant), data.labels, classes=data.classes, l2=self.l2):
                score = leave_one_out(fit, data.labels)
                candidates.append(Candidate(variant, {"l2": fit.l2}, score.accuracy, score.error))
                if best is None or selection_score(score, data.labels) > best:
                    best, probe, chosen = selection_score(score, data.labels), fit.probe, candidates[-1]
        return probe, chosen, candidates

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return everything that determines the numbers, and the images of the selection."""
        protocol = {
            "solver": "ridge regression",
            "objective": "mean squared error to -1 and 1 per class / 2 + l2 / 2 |W|^2, bias not penalized",
            "l2": sorted(set(self.l2)),
        }
        return protocol, {"on": "exact leave-one-out over the training images, standardized by all; tested once"}


class SGD(NamedTuple):
    """A grid of heads trained simultaneously by SGD, selected on a val split."""

    lr: Sequence[float]
    weight_decay: Sequence[float]
    schedule: Schedule
    val_fraction: float

    def select(self, data: ProbeData, variants: Sequence[FeatureVariant]) -> Selected:
        """Evaluate on the val split, then train the best on all."""
        val = _val_mask(data, self.val_fraction, self.schedule.seed)
        widest = FeatureVariant(max(v.blocks for v in variants), any(v.patch_mean for v in variants))
        features, labels = data.of(widest), data.labels
        grid = list(product(variants, sorted(self.lr), sorted(self.weight_decay)))
        heads = [Head(v.columns(widest, data.features), lr, decay) for v, lr, decay in grid]
        probes = train_heads(features, labels, classes=data.classes, heads=heads, schedule=self.schedule, mask=~val)
        val_features = features[val]
        candidates = []
        for (variant, lr, decay), head, probe in zip(grid, heads, probes, strict=True):
            logits = probe.logits(val_features[:, head.columns])
            candidates.append(_evaluate(variant, {"lr": lr, "weight_decay": decay}, logits, labels[val]))
        ranking = sorted(zip(candidates, heads, strict=True), key=lambda pair: pair[0].rank, reverse=True)
        for candidate, head in ranking:
            if math.isfinite(candidate.loss):
                (probe,) = train_heads(features, labels, classes=data.classes, heads=[head], schedule=self.schedule)
                if all(part.isfinite().all() for part in probe):
                    return probe, candidate, candidates
        raise UserError(f"all heads diverged; lower sgd.lr (the smallest was {min(self.lr):g})")

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return everything that determines the numbers, and the images of the selection."""
        protocol = {
            "solver": f"SGD from zero, momentum {MOMENTUM:g}, learning rate to 0 by half a cosine per step",
            "objective": "mean cross-entropy, weight decay on weights only",
            "lr": sorted(set(self.lr)),
            "weight_decay": sorted(set(self.weight_decay)),
            "epochs": self.schedule.epochs,
            "batch_size": self.schedule.batch_size,
        }
        return protocol, _val_selection(self.val_fraction, self.schedule.seed)


Solver = Logistic | Ridge | SGD


def linear_probe(
    train: Features, test: Features, *, variants: Sequence[FeatureVariant], solver: Solver, device: torch.device
) -> LinearResult:
    """Select features among the variants, and the solver's settings, on the training images, fit to all, test once.

    Raises:
        UserError: The training images do not allow a selection, or features are not finite.
    """
    classes, labels = torch.unique(train.labels, return_inverse=True)
    with full_precision():
        data = ProbeData(train, labels.to(device), len(classes), device)
        probe, chosen, candidates = solver.select(data, variants)
        logits = probe.logits(_check_finite(chosen.variant.of(test)).to(device)).cpu()
    return LinearResult(
        label_ranks(logits, classes, test.labels),
        classes[logits.argmax(dim=1)],
        LinearClassifier(*(part.cpu() for part in probe)),
        classes,
        chosen,
        candidates,
        _warnings(chosen, candidates),
    )


def _val_mask(data: ProbeData, fraction: float, seed: int) -> Tensor:
    """Draw the val split as a mask (N,)."""
    val = stratified(data.labels.cpu(), fraction, seed=seed)
    if not val.any():
        raise UserError(
            "no class has two training images, so there is no val split to select a probe on; "
            "use solver=ridge, which selects by leave-one-out"
        )
    return val.to(data.device)


def _val_selection(fraction: float, seed: int) -> dict[str, Any]:
    on = f"{fraction:g} of the training images of each class, refit on all, tested once"
    return {"on": on, "fraction": fraction, "seed": seed}


def _check_finite(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise UserError("features are not finite: they exceed the range of the dtype that they were stored in")
    return features


def _evaluate(variant: FeatureVariant, settings: Mapping[str, float], logits: Tensor, labels: Tensor) -> Candidate:
    loss = float(F.cross_entropy(logits, labels))
    if not math.isfinite(loss):
        return Candidate(variant, settings, 0.0, math.inf)
    return Candidate(variant, settings, float((logits.argmax(dim=1) == labels).float().mean()), loss)


def _warnings(chosen: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    texts = []
    for name, value in chosen.settings.items():
        offered = {candidate.settings[name] for candidate in candidates}
        for end, extreme in (("smallest", min(offered)), ("largest", max(offered))):
            if value == extreme != 0 and len(offered) > 1:
                texts.append(f"the selected {name} = {value:g} is the {end} candidate; extend the range of {name}")
    if diverged := [candidate for candidate in candidates if math.isinf(candidate.loss)]:
        least = min(candidate.settings["lr"] for candidate in diverged)
        texts.append(f"{len(diverged)} of {len(candidates)} heads diverged, all with lr {least:g} or more")
    return texts
