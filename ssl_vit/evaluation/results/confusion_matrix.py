"""Confusion matrix, per-class accuracy and the hardest test images."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.evaluation.results.eval_result import Predictions
from ssl_vit.evaluation.results.statistics import wilson

_PAIRS = 25  # of classes, listed in a result


class Confusion(NamedTuple):
    """How many images of one class were predicted as another."""

    target: int
    predicted: int
    images: int


class ConfusionSummary(NamedTuple):
    """The predictions of one evaluation by class."""

    metric: str
    classes: list[str]
    target: Tensor  # (Q,) int64, indices of `classes`
    predicted: Tensor  # (Q,) int64

    @property
    def matrix(self) -> Tensor:
        """(C, C) int64: images of the row's class that were predicted as the column's."""
        size = len(self.classes)
        return torch.bincount(self.target * size + self.predicted, minlength=size**2).view(size, size)

    @property
    def totals(self) -> Tensor:
        """(C,) int64: test images of each class."""
        return torch.bincount(self.target, minlength=len(self.classes))

    @property
    def correct(self) -> Tensor:
        """(C,) int64: test images of each class that were predicted correctly."""
        return torch.bincount(self.target[self.target == self.predicted], minlength=len(self.classes))

    @property
    def accuracy(self) -> Tensor:
        """(C,) float64 in [0, 1]; NaN for a class without test images."""
        return self.correct.double() / self.totals

    def intervals(self) -> Tensor:
        """Compute Wilson's 95 % intervals of the accuracies (C, 2); NaN for a class without test images."""
        none = float("nan"), float("nan")
        counts = zip(self.correct.tolist(), self.totals.tolist(), strict=True)
        return torch.tensor([wilson(right, n) if n else none for right, n in counts], dtype=torch.float64)

    def pairs(self, most: int = _PAIRS) -> list[Confusion]:
        """Return the most frequent confusions; among equal ones the first in the order of the classes."""
        size = len(self.classes)
        wrong = (self.target * size + self.predicted)[self.target != self.predicted]
        pair, count = torch.unique(wrong, return_counts=True)
        count, order = count.sort(descending=True, stable=True)
        frequent = zip(pair[order[:most]].tolist(), count[:most].tolist(), strict=True)
        return [Confusion(code // size, code % size, images) for code, images in frequent]

    def to_dict(self) -> dict[str, Any]:
        """Return the accuracy of every class and the most frequent confusions, with the names of the classes."""
        rows = zip(self.classes, self.totals.tolist(), self.accuracy.tolist(), self.intervals().tolist(), strict=True)
        return {
            "metric": self.metric,
            "classes": [
                {"name": name, "n": n, "value": value, "low": low, "high": high, "interval": "Wilson"}
                for name, n, value, (low, high) in rows
            ],
            "confusions": [
                {"target": self.classes[pair.target], "predicted": self.classes[pair.predicted], "images": pair.images}
                for pair in self.pairs()
            ],
        }


def hardest_images(predictions: Predictions, most: int) -> Tensor:
    """Return rows (at most `most`,) of the wrong predictions whose true class was ranked last.

    Equal ranks are shuffled with a fixed seed: the first images of a folder are all of one class.
    """
    shuffled = torch.randperm(len(predictions.rank), generator=torch.Generator().manual_seed(0))
    order = shuffled[predictions.rank[shuffled].argsort(descending=True, stable=True)][:most]
    return order[predictions.rank[order] > 0]
