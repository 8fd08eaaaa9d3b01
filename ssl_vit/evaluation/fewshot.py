"""Accuracy with few labels: nested subsets of the training pictures, ridge probe and nearest neighbour on each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_vit.errors import UserError
from ssl_vit.evaluation.features import Features
from ssl_vit.evaluation.knn import Labelled, knn
from ssl_vit.evaluation.probes import Variant, label_ranks
from ssl_vit.evaluation.ridge import left_out_score, ridge_path
from ssl_vit.evaluation.search import full_precision
from ssl_vit.records.intervals import OVER_SUBSETS, mean_interval, wilson
from ssl_vit.records.record import Answers, Metric

RIDGE, NEAREST = "ridge", "1-NN"


class Setting(NamedTuple):
    """How many labels there are."""

    name: str
    counts: Tensor  # (C,) int64: pictures of each class, in the order of the labels


class Outcome(NamedTuple):
    """How one classifier did in one setting."""

    setting: str
    classifier: str
    accuracy: list[float]  # of each subset, in [0, 1]
    answers: Answers  # of the first subset
    l2: list[float]  # chosen on each subset; empty for a classifier without a penalty

    @property
    def suffix(self) -> str:
        """What follows "top-1" in the name of the metric."""
        return f", {self.setting}, {self.classifier}"

    def metric(self) -> Metric:
        """The mean over the subsets, its 95 % interval for other subsets: they all have the same test pictures.

        Of one subset the interval is for other test pictures.
        """
        n, value = len(self.answers.place), mean(self.accuracy)
        if len(self.accuracy) == 1:
            return Metric(f"top-1{self.suffix}", value, n, *wilson(round(value * n), n))
        interval = OVER_SUBSETS.format(len(self.accuracy))
        return Metric(f"top-1{self.suffix}", value, n, *mean_interval(self.accuracy), interval)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over the subsets; None of one."""
        return stdev(self.accuracy) if len(self.accuracy) > 1 else None


def settings(labels: Tensor, *, shots: Sequence[int], shares: Sequence[float]) -> tuple[list[Setting], list[str]]:
    """What can be asked for of training pictures with labels (N,), and warnings of what cannot, or not quite.

    Args:
        labels: Of the training pictures.
        shots: Pictures per class; numbers above the smallest class are left out.
        shares: Of the pictures of each class, in (0, 1]; at least one picture is taken.

    Raises:
        UserError: Nothing is left.
    """
    sizes = torch.unique(labels, return_counts=True)[1]
    smallest = int(sizes.min())
    wanted = [Setting(f"{shot} per class", torch.full_like(sizes, shot)) for shot in sorted(set(shots))]
    found = [setting for setting in wanted if int(setting.counts[0]) <= smallest]
    texts = []
    if left_out := [str(int(setting.counts[0])) for setting in wanted[len(found) :]]:
        texts.append(f"{', '.join(left_out)} per class: left out, the smallest class has {smallest} training pictures")
    for share in sorted(set(shares)):
        counts = (share * sizes.double()).round().long().clamp(min=1)
        if share * smallest < 1:
            texts.append(f"{100 * share:g} %: less than one picture of the smallest class ({smallest}); one is taken")
        found.append(Setting(f"{100 * share:g} %", counts))
    by_counts: dict[tuple[int, ...], list[Setting]] = {}
    for setting in found:
        by_counts.setdefault(tuple(setting.counts.tolist()), []).append(setting)
    if not by_counts:
        raise UserError(f"few labels: {'; '.join(texts) or 'name some shots or shares'}")
    different = [Setting(" = ".join(same.name for same in group), group[0].counts) for group in by_counts.values()]
    return sorted(different, key=lambda setting: int(setting.counts.sum())), texts


def draw(labels: Tensor, index: Tensor, *, seed: int) -> Tensor:
    """The turn (N,) int64 at which each picture is drawn from its class, from 0.

    The subset of n pictures per class is those with a turn below n, so smaller subsets lie within larger ones. It
    depends on the pictures' labels and places `index` (N,) only, not on their order: features of all networks get
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
    variant: Variant,
    among: Sequence[Setting],
    seeds: Sequence[int],
    l2: Sequence[float],
    device: torch.device,
) -> list[Outcome]:
    """Classify the test pictures by what the labels of subsets tell; the penalty is chosen within the subset.

    Args:
        train: Where the subsets are drawn from.
        test: What is measured on; nothing is chosen by it.
        variant: The features of the ridge probe; the nearest neighbour has the cosine of the last block's [CLS].
        among: The settings.
        seeds: Of the subsets, one for each.
        l2: Penalties to choose from, by the squared error of exact leave-one-out: of few pictures the accuracy is
            too coarse, and where a class has but one it tells nothing.
        device: Where to compute.
    """
    classes, places = torch.unique(train.labels, return_inverse=True)
    asked = variant.of(test).to(device)
    queries = Labelled(test.cls[:, -1].float().to(device), test.labels.to(device))
    turns = [draw(train.labels, train.index, seed=seed) for seed in seeds]
    outcomes = []
    with full_precision(), tqdm(total=len(among) * len(seeds), desc="few labels", unit="", disable=None) as bar:
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
                ridge.append(Answers(test.index, test.labels, classes[logits.argmax(dim=1)], rank))
                bank = Labelled(subset.cls[:, -1].float().to(device), subset.labels.to(device))
                found = knn(bank, queries, ks=[1], temperature=1.0)
                nearest.append(Answers(test.index, test.labels, found.predicted[1].cpu(), found.ranks[1].cpu()))
                bar.update()
            outcomes.append(Outcome(setting.name, RIDGE, _accuracy(ridge), ridge[0], chosen))
            outcomes.append(Outcome(setting.name, NEAREST, _accuracy(nearest), nearest[0], []))
    return outcomes


def edge_warnings(outcomes: Sequence[Outcome], l2: Sequence[float]) -> list[str]:
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
        "picture, leaving it out always asks for the largest"
    ]


def _accuracy(answers: Sequence[Answers]) -> list[float]:
    return [float((one.rank == 0).double().mean()) for one in answers]
