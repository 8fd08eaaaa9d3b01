"""Few-shot accuracy: nested subsets of the training images, with a ridge probe and a nearest neighbor on each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.evaluation.classification.knn import LabeledFeatures, knn
from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, label_ranks
from ssl_vit.evaluation.classification.nearest_neighbors import full_precision
from ssl_vit.evaluation.classification.ridge_regression import leave_one_out, ridge_path
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.evaluation.results.eval_result import Metric, Predictions
from ssl_vit.evaluation.results.statistics import OVER_SUBSETS, subsets_interval, wilson
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar

RIDGE, NEAREST = "ridge", "1-NN"


class FewShotSetting(NamedTuple):
    """A number of labels."""

    name: str
    counts: Tensor  # (C,) int64: images of each class, in the order of the labels


class FewShotResult(NamedTuple):
    """The accuracy of one classifier in one setting."""

    setting: str
    classifier: str
    accuracy: list[float]  # of each subset, in [0, 1]
    predictions: Predictions  # of the first subset
    l2: list[float]  # selected on each subset; empty for a classifier without a penalty

    @property
    def suffix(self) -> str:
        """The part of the metric's name after "top-1"."""
        return f", {self.setting}, {self.classifier}"

    def metric(self) -> Metric:
        """Return the mean over the subsets of the same test images; its 95 % interval is over images and subsets."""
        n, value = len(self.predictions.indices), mean(self.accuracy)
        if len(self.accuracy) == 1:
            interval, (low, high) = "Wilson", wilson(round(value * n), n)
        else:
            interval, (low, high) = OVER_SUBSETS.format(len(self.accuracy)), subsets_interval(self.accuracy, n)
        return Metric(name=f"top-1{self.suffix}", value=value, n=n, low=low, high=high, interval=interval)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over the subsets; None for a single one."""
        return stdev(self.accuracy) if len(self.accuracy) > 1 else None


def few_shot_settings(
    labels: Tensor, *, shots: Sequence[int], shares: Sequence[float]
) -> tuple[list[FewShotSetting], list[str]]:
    """Return the settings for training images with labels (N,), by size, and warnings of skipped or adjusted ones.

    Shots are images per class; numbers above the smallest class are skipped. Shares are fractions in (0, 1] of the
    images of each class; at least one image is used.

    Raises:
        UserError: No setting remains.
    """
    sizes = torch.unique(labels, return_counts=True)[1]
    smallest = int(sizes.min())
    possible = [shot for shot in sorted(set(shots)) if shot <= smallest]
    found = [FewShotSetting(f"{shot} per class", torch.full_like(sizes, shot)) for shot in possible]
    texts = []
    if skipped := [str(shot) for shot in sorted(set(shots)) if shot > smallest]:
        texts.append(f"{', '.join(skipped)} per class: skipped, the smallest class has {smallest} training images")
    for share in sorted(set(shares)):
        counts = (share * sizes.double()).round().long().clamp(min=1)
        if share * smallest < 1:
            texts.append(f"{100 * share:g} %: less than one image of the smallest class ({smallest}); one is used")
        found.append(FewShotSetting(f"{100 * share:g} %", counts))
    by_counts: dict[tuple[int, ...], list[FewShotSetting]] = {}
    for setting in found:
        by_counts.setdefault(tuple(setting.counts.tolist()), []).append(setting)
    if not by_counts:
        raise UserError(f"few labels: {'; '.join(texts) or 'set shots or shares'}")
    merged = [FewShotSetting(" = ".join(same.name for same in group), group[0].counts) for group in by_counts.values()]
    return sorted(merged, key=lambda setting: int(setting.counts.sum())), texts


def draw_order(labels: Tensor, index: Tensor, *, seed: int) -> Tensor:
    """Return the position (N,) int64, from 0, at which each image is drawn from its class.

    The subset of n images per class are those with a position below n, so smaller subsets are part of larger ones. The
    order depends on the images' labels and indices `index` (N,) only: features of all models get the same subsets.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(int(index.max()) + 1, generator=generator)[index].argsort()
    order = order[labels[order].argsort(stable=True)]  # by class, then random
    _, sizes = torch.unique(labels, return_counts=True)
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order)) - first
    return position


def few_shot(
    train: Features,
    test: Features,
    *,
    variant: FeatureVariant,
    settings: Sequence[FewShotSetting],
    seeds: Sequence[int],
    l2: Sequence[float],
    device: torch.device,
) -> list[FewShotResult]:
    """Classify the test images from subsets of the training images, in each setting one subset per seed.

    The ridge probe uses the features `variant`, the nearest neighbor the cosine of the last block's [CLS]. The penalty
    is selected within the subset by the squared error of exact leave-one-out: for few images the accuracy is too
    coarse, and with one image per class it is not informative.
    """
    classes, encoded = torch.unique(train.labels, return_inverse=True)
    test_features = variant.of(test).to(device)
    queries = LabeledFeatures(test.cls[:, -1].float().to(device), test.labels.to(device))
    orders = [draw_order(train.labels, train.index, seed=seed) for seed in seeds]
    results = []
    with full_precision(), progress_bar(total=len(settings) * len(seeds), desc="few labels", unit="") as bar:
        for setting in settings:
            ridge, nearest, selected = [], [], []
            for order in orders:
                rows = (order < setting.counts[encoded]).nonzero().squeeze(1)
                subset, labels = train.take(rows), encoded[rows].to(device)
                fits = ridge_path(variant.of(subset).to(device), labels, classes=len(classes), l2=l2)
                best = min(fits, key=lambda fit: leave_one_out(fit, labels).error)
                selected.append(best.l2)
                logits = best.probe.logits(test_features).cpu()
                rank = label_ranks(logits, classes, test.labels)
                ridge.append(Predictions(test.index, test.labels, classes[logits.argmax(dim=1)], rank))
                shots = LabeledFeatures(subset.cls[:, -1].float().to(device), subset.labels.to(device))
                found = knn(shots, queries, ks=[1], temperature=1.0)
                nearest.append(Predictions(test.index, test.labels, found.predicted[1].cpu(), found.ranks[1].cpu()))
                bar.update()
            results.append(FewShotResult(setting.name, RIDGE, _accuracy(ridge), ridge[0], selected))
            results.append(FewShotResult(setting.name, NEAREST, _accuracy(nearest), nearest[0], []))
    return results


def edge_warnings(results: Sequence[FewShotResult], l2: Sequence[float]) -> list[str]:
    """Return one warning that lists the settings in which the smallest or largest penalty was selected."""
    ends = {name: value for name, value in (("smallest", min(l2)), ("largest", max(l2))) if len(set(l2)) > 1}
    texts = [
        f"{result.setting} (the {name} {count} of {len(result.l2)} times)"
        for result in results
        for name, value in ends.items()
        if (count := result.l2.count(value))
    ]
    if not texts:
        return []
    return [
        f"the selected l2 is an end of the candidates: {', '.join(texts)}; extend l2, except where each class has one "
        "image: there leave-one-out always selects the largest"
    ]


def _accuracy(predictions: Sequence[Predictions]) -> list[float]:
    return [float((one.rank == 0).double().mean()) for one in predictions]
