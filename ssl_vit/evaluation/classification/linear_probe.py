"""Linear probe on frozen features, chosen by training images alone; the test images are looked at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, Protocol

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
from ssl_vit.evaluation.classification.ridge_regression import left_out_score, ridge_path, selection_score
from ssl_vit.evaluation.classification.sgd_classifiers import MOMENTUM, Head, Schedule, train_heads
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar


class Candidate(NamedTuple):
    """One probe of the choice, judged by images that it has not seen."""

    variant: FeatureVariant
    settings: Mapping[str, float]  # by the names of their keys
    accuracy: float  # in [0, 1]
    loss: float  # mean cross-entropy, of ridge the squared error; infinite where the probe has diverged


class ProbeData(NamedTuple):
    """The N images to learn from."""

    features: Features
    labels: Tensor  # (N,) int64 in [0, classes), on the device
    classes: int
    device: torch.device

    def of(self, variant: FeatureVariant) -> Tensor:
        """The features (N, D) float32 of a variant, on the device."""
        return _finite(variant.of(self.features)).to(self.device)


class SelectedProbe(NamedTuple):
    """The probe that was chosen, fitted to all training images."""

    probe: LinearClassifier
    chosen: Candidate
    trials: list[Candidate]


class Solver(Protocol):
    """A way from features to a probe, with what is to be chosen on the way."""

    def choose(self, training: ProbeData, variants: Sequence[FeatureVariant]) -> SelectedProbe:
        """The best probe of all variants and settings.

        Raises:
            UserError: The training images allow no choice.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What decides over the numbers, for the record."""
        ...

    def selection(self) -> dict[str, Any]:
        """By which images it chooses (`on`); where a part is held out, its `fraction` of each class and `seed`."""
        ...


class LinearResult(NamedTuple):
    """How the chosen probe classified Q test images."""

    ranks: Tensor  # (Q,) int64: how many classes came before the true one; 0 is right
    predicted: Tensor  # (Q,) int64: the labels of highest score
    probe: LinearClassifier  # on the CPU
    classes: Tensor  # (C,) int64: the labels that its scores stand for
    chosen: Candidate
    trials: list[Candidate]
    warnings: list[str]


def linear_probe(
    train: Features, test: Features, *, variants: Sequence[FeatureVariant], solver: Solver, device: torch.device
) -> LinearResult:
    """Choose features and settings by the training images, fit to all of them, test once.

    Args:
        train: The images to learn from.
        test: The images to be measured on; nothing is chosen by them.
        variants: Features to choose from.
        solver: How to fit, and what else to choose.
        device: Where to compute.

    Raises:
        UserError: The training images allow no choice, or features are not finite.
    """
    classes, labels = torch.unique(train.labels, return_inverse=True)
    with full_precision():
        training = ProbeData(train, labels.to(device), len(classes), device)
        probe, chosen, trials = solver.choose(training, variants)
        asked = _finite(chosen.variant.of(test)).to(device)
        logits = probe.logits(asked).cpu()
    return LinearResult(
        label_ranks(logits, classes, test.labels),
        classes[logits.argmax(dim=1)],
        LinearClassifier(*(part.cpu() for part in probe)),
        classes,
        chosen,
        trials,
        _warnings(chosen, trials),
    )


class Logistic(NamedTuple):
    """Multinomial logistic regression by L-BFGS, chosen on a held-out share of each class."""

    l2: Sequence[float]
    held_out: float
    seed: int  # of the held-out share

    def choose(self, training: ProbeData, variants: Sequence[FeatureVariant]) -> SelectedProbe:
        """Judge by the held-out images, then fit the best to all."""
        held = _held(training, self.held_out, self.seed)
        labels, classes = training.labels, training.classes
        trials: list[Candidate] = []
        with progress_bar(total=len(variants) * len(self.l2), desc="linear probe", unit="") as bar:
            for variant in variants:
                features = training.of(variant)
                space, asked = standard_space(features), features[held]
                del features
                for l2, probe in logistic_path(space, labels, classes=classes, l2=self.l2, dataset=~held):
                    trials.append(_judged(variant, {"l2": l2}, probe.logits(asked), labels[held]))
                    bar.update()
                if (best := max(trials, key=_merit)).variant == variant:
                    chosen, its_space = best, space
        best_l2 = [chosen.settings["l2"]]
        _, probe = next(logistic_path(its_space, labels, classes=classes, l2=best_l2, tolerance=FINAL_TOLERANCE))
        return SelectedProbe(probe, chosen, trials)

    def describe(self) -> dict[str, Any]:
        """What decides over the numbers."""
        return {
            "solver": "logistic regression",
            "objective": "mean cross-entropy + l2 / 2 |W|^2, bias free",
            "l2": sorted(set(self.l2)),
            "selection": self.selection()["on"],
        }

    def selection(self) -> dict[str, Any]:
        """By which images it chooses."""
        return _held_out_selection(self.held_out, self.seed)


class Ridge(NamedTuple):
    """Ridge regression in closed form, chosen by exact leave-one-out, so that nothing is fitted twice."""

    l2: Sequence[float]

    def choose(self, training: ProbeData, variants: Sequence[FeatureVariant]) -> SelectedProbe:
        """Judge each image by the probe fitted without it."""
        trials: list[Candidate] = []
        best: tuple[float, float] | None = None
        for variant in progress_bar(variants, desc="ridge probe", unit=""):
            for fit in ridge_path(training.of(variant), training.labels, classes=training.classes, l2=self.l2):
                score = left_out_score(fit, training.labels)
                trials.append(Candidate(variant, {"l2": fit.l2}, score.accuracy, score.error))
                if best is None or selection_score(score, training.labels) > best:
                    best, probe, chosen = selection_score(score, training.labels), fit.probe, trials[-1]
        return SelectedProbe(probe, chosen, trials)

    def describe(self) -> dict[str, Any]:
        """What decides over the numbers."""
        return {
            "solver": "ridge regression",
            "objective": "mean squared error to -1 and 1 per class / 2 + l2 / 2 |W|^2, bias free",
            "l2": sorted(set(self.l2)),
            "selection": self.selection()["on"],
        }

    def selection(self) -> dict[str, Any]:
        """By which images it chooses."""
        return {"on": "exact leave-one-out over the training images, standardized by all; tested once"}


class SGD(NamedTuple):
    """A grid of heads trained by SGD at once, chosen on a held-out share of each class."""

    lr: Sequence[float]
    weight_decay: Sequence[float]
    schedule: Schedule
    held_out: float

    def choose(self, training: ProbeData, variants: Sequence[FeatureVariant]) -> SelectedProbe:
        """Judge by the held-out images, then train the best on all."""
        held = _held(training, self.held_out, self.schedule.seed)
        widest = FeatureVariant(max(v.blocks for v in variants), any(v.patch_mean for v in variants))
        features, labels = training.of(widest), training.labels
        grid = list(product(variants, sorted(self.lr), sorted(self.weight_decay)))
        heads = [Head(v.columns(widest, training.features), lr, decay) for v, lr, decay in grid]
        probes = train_heads(
            features, labels, classes=training.classes, heads=heads, schedule=self.schedule, dataset=~held
        )
        asked = features[held]
        trials = [
            _judged(variant, {"lr": lr, "weight_decay": decay}, probe.logits(asked[:, head.columns]), labels[held])
            for (variant, lr, decay), head, probe in zip(grid, heads, probes, strict=True)
        ]
        for place in sorted(range(len(grid)), key=lambda place: _merit(trials[place]), reverse=True):
            if math.isfinite(trials[place].loss):
                one = [heads[place]]
                (probe,) = train_heads(features, labels, classes=training.classes, heads=one, schedule=self.schedule)
                if all(part.isfinite().all() for part in probe):
                    return SelectedProbe(probe, trials[place], trials)
        raise UserError(f"no head has kept finite weights: lower sgd.lr (the smallest was {min(self.lr):g})")

    def describe(self) -> dict[str, Any]:
        """What decides over the numbers."""
        return {
            "solver": f"SGD from zero, momentum {MOMENTUM:g}, learning rate to 0 by half a cosine per step",
            "objective": "mean cross-entropy, weight decay on weights only",
            "lr": sorted(set(self.lr)),
            "weight_decay": sorted(set(self.weight_decay)),
            "epochs": self.schedule.epochs,
            "batch_size": self.schedule.batch_size,
            "selection": self.selection()["on"],
        }

    def selection(self) -> dict[str, Any]:
        """By which images it chooses."""
        return _held_out_selection(self.held_out, self.schedule.seed)


def _held(training: ProbeData, share: float, seed: int) -> Tensor:
    """A mask (N,) of the images that a choice is made on."""
    held = stratified(training.labels.cpu(), share, seed=seed)
    if not held.any():
        raise UserError(
            "no class has two training images: nothing can be held out to choose a probe on; "
            "solver=ridge chooses by leave-one-out"
        )
    return held.to(training.device)


def _held_out_selection(share: float, seed: int) -> dict[str, Any]:
    on = f"{share:g} of the training images of each class, refit on all, tested once"
    return {"on": on, "fraction": share, "seed": seed}


def _finite(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise UserError("features are not finite numbers: they exceed the type that they were stored in")
    return features


def _judged(variant: FeatureVariant, settings: Mapping[str, float], logits: Tensor, labels: Tensor) -> Candidate:
    loss = float(F.cross_entropy(logits, labels))
    if not math.isfinite(loss):
        return Candidate(variant, settings, 0.0, math.inf)
    return Candidate(variant, settings, float((logits.argmax(dim=1) == labels).float().mean()), loss)


def _merit(trial: Candidate) -> tuple[float, float]:
    """The more right the better; of equals the one with the lower loss."""
    return trial.accuracy, -trial.loss


def _warnings(chosen: Candidate, trials: Sequence[Candidate]) -> list[str]:
    texts = []
    for name, value in chosen.settings.items():
        offered = {trial.settings[name] for trial in trials}
        for end, extreme in (("smallest", min(offered)), ("largest", max(offered))):
            if value == extreme != 0 and len(offered) > 1:
                texts.append(f"the chosen {name} = {value:g} is the {end} that was offered: widen {name}")
    if diverged := [trial for trial in trials if math.isinf(trial.loss)]:
        least = min(trial.settings["lr"] for trial in diverged)
        texts.append(f"{len(diverged)} of {len(trials)} heads have diverged, all with lr {least:g} or more")
    return texts
