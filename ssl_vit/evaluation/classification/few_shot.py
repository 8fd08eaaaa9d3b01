"""Accuracy with few labels: nested subsets of the training images, ridge probe and nearest neighbor on each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.evaluation.classification.knn import LabeledFeatures, knn
from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, label_ranks
from ssl_vit.evaluation.classification.nearest_neighbors import full_precision
from ssl_vit.evaluation.classification.ridge_regression import left_out_score, ridge_path
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.evaluation.results.eval_result import Metric, Predictions
from ssl_vit.evaluation.results.statistics import OVER_SUBSETS, mean_interval, wilson
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar

RIDGE, NEAREST = "ridge", "1-NN"


class FewShotSetting(NamedTuple):
    """How many labels there are."""

    name: str
    counts: Tensor  # (C,) int64: images of each class, in the order of the labels


class FewShotResult(NamedTuple):
    """How one classifier did in one setting."""

    setting: str
    classifier: str
    accuracy: list[float]  # of each subset, in [0, 1]
    answers: Predictions  # of the first subset
    l2: list[float]  # chosen on each subset; empty for a classifier without a penalty

    @property
    def suffix(self) -> str:
        """What follows "top-1" in the name of the metric."""
        return f", {self.setting}, {self.classifier}"

    def metric(self) -> Metric:
        """The mean over the subsets, its 95 % interval for other subsets: they all have the same test images.

        Of one subset the interval is for other test images.
        """
        n, value = len(self.answers.indices), mean(self.accuracy)
        if len(self.accuracy) == 1:
            interval, (low, high) = "Wilson", wilson(round(value * n), n)
        else:
            interval, (low, high) = OVER_SUBSETS.format(len(self.accuracy)), mean_interval(self.accuracy)
        return Metric(name=f"top-1{self.suffix}", value=value, n=n, low=low, high=high, interval=interval)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over the subsets; None of one."""
        return stdev(self.accuracy) if len(self.accuracy) > 1 else None


def settings(
    labels: Tensor, *, shots: Sequence[int], shares: Sequence[float]
) -> tuple[list[FewShotSetting], list[str]]:
    """What can be asked for of training images with labels (N,), and warnings of what cannot, or not quite.

    Args:
        labels: Of the training images.
        shots: Images per class; numbers above the smallest class are left out.
        shares: Of the images of each class, in (0, 1]; at least one image is taken.

    Raises:
        UserError: Nothing is left.
    """
    sizes = torch.unique(labels, return_counts=True)[1]
    smallest = int(sizes.min())
    wanted = [FewShotSetting(f"{shot} per class", torch.full_like(sizes, shot)) for shot in sorted(set(shots))]
    found = [setting for setting in wanted if int(setting.counts[0]) <= smallest]
    texts = []
    if left_out := [str(int(setting.counts[0])) for setting in wanted[len(found) :]]:
        texts.append(f"{', '.join(left_out)} per class: left out, the smallest class has {smallest} training images")
    for share in sorted(set(shares)):
        counts = (share * sizes.double()).round().long().clamp(min=1)
        if share * smallest < 1:
            texts.append(f"{100 * share:g} %: less than one image of the smallest class ({smallest}); one is taken")
        found.append(FewShotSetting(f"{100 * share:g} %", counts))
    by_counts: dict[tuple[int, ...], list[FewShotSetting]] = {}
    for setting in found:
        by_counts.setdefault(tuple(setting.counts.tolist()), []).append(setting)
    if not by_counts:
        raise UserError(f"few labels: {'; '.join(texts) or 'name some shots or shares'}")
    different = [
        FewShotSetting(" = ".join(same.name for same in group), group[0].counts) for group in by_counts.values()
    ]
    return sorted(different, key=lambda setting: int(setting.counts.sum())), texts


def draw_order(labels: Tensor, index: Tensor, *, seed: int) -> Tensor:
    """The turn (N,) int64 at which each image is drawn from its class, from 0.

    The subset of n images per class is those with a turn below n, so smaller subsets lie within larger ones. It
    depends on the images' labels and places `index` (N,) only, not on their order: features of all models get
    the same subsets.
    """
    generator = torch.Generator().manual_seed(seed)
    lot = torch.randperm(int(index.max()) + 1, generator=generator)[index]
    order = lot.argsort()
    order = order[labels[order].argsort(stable=True)]  # by class, then by lot
    _, sizes = torch.unique(labels, return_counts=True)
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    turn = torch.empty_like(order)
    turn[order] = torch.arange(len(order)) - first
    return turn


def few_shot(
    train: Features,
    test: Features,
    *,
    variant: FeatureVariant,
    among: Sequence[FewShotSetting],
    seeds: Sequence[int],
    l2: Sequence[float],
    device: torch.device,
) -> list[FewShotResult]:
    """Classify the test images by what the labels of subsets tell; the penalty is chosen within the subset.

    Args:
        train: Where the subsets are drawn from.
        test: What is measured on; nothing is chosen by it.
        variant: The features of the ridge probe; the nearest neighbor has the cosine of the last block's [CLS].
        among: The settings.
        seeds: Of the subsets, one for each.
        l2: Penalties to choose from, by the squared error of exact leave-one-out: of few images the accuracy is
            too coarse, and where a class has but one it tells nothing.
        device: Where to compute.
    """
    classes, places = torch.unique(train.labels, return_inverse=True)
    asked = variant.of(test).to(device)
    queries = LabeledFeatures(test.cls[:, -1].float().to(device), test.labels.to(device))
    turns = [draw_order(train.labels, train.index, seed=seed) for seed in seeds]
    outcomes = []
    with full_precision(), progress_bar(total=len(among) * len(seeds), desc="few labels", unit="") as bar:
        for setting in among:
            ridge, nearest, chosen = [], [], []
            for turn in turns:
                rows = (turn < setting.counts[places]).nonzero().squeeze(1)
                subset, labels = train.take(rows), places[rows].to(device)
                fits = ridge_path(variant.of(subset).to(device), labels, classes=len(classes), l2=l2)
                best = min(fits, key=lambda fit: left_out_score(fit, labels).error)
                chosen.append(best.l2)
                logits = best.probe.logits(asked).cpu()
                rank = label_ranks(logits, classes, test.labels)
                ridge.append(Predictions(test.index, test.labels, classes[logits.argmax(dim=1)], rank))
                bank = LabeledFeatures(subset.cls[:, -1].float().to(device), subset.labels.to(device))
                found = knn(bank, queries, ks=[1], temperature=1.0)
                nearest.append(Predictions(test.index, test.labels, found.predicted[1].cpu(), found.ranks[1].cpu()))
                bar.update()
            outcomes.append(FewShotResult(setting.name, RIDGE, _accuracy(ridge), ridge[0], chosen))
            outcomes.append(FewShotResult(setting.name, NEAREST, _accuracy(nearest), nearest[0], []))
    return outcomes


def edge_warnings(outcomes: Sequence[FewShotResult], l2: Sequence[float]) -> list[str]:
    """In one line the settings in which an end of the offered penalties was chosen."""
    ends = {name: value for name, value in (("smallest", min(l2)), ("largest", max(l2))) if len(set(l2)) > 1}
    texts = [
        f"{outcome.setting} (the {name} {count} of {len(outcome.l2)} times)"
        for outcome in outcomes
        for name, value in ends.items()
        if (count := outcome.l2.count(value))
    ]
    if not texts:
        return []
    return [
        f"the chosen l2 is an end of what was offered: {', '.join(texts)}; widen l2, but where each class has one "
        "image, leaving it out always asks for the largest"
    ]


def _accuracy(answers: Sequence[Predictions]) -> list[float]:
    return [float((one.rank == 0).double().mean()) for one in answers]
