"""What a model takes for what: the confusion of its classes, the accuracy of each, the images it finds hardest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.evaluation.results.eval_result import Predictions
from ssl_vit.evaluation.results.statistics import wilson

_PAIRS = 25  # of classes, that a record lists


class Confused(NamedTuple):
    """How often one class was taken for another."""

    truth: int
    predicted: int
    dataset: int


class ConfusionSummary(NamedTuple):
    """The answers of one evaluation, class by class."""

    metric: str
    classes: list[str]
    truth: Tensor  # (Q,) int64, places in `classes`
    predicted: Tensor  # (Q,) int64

    @property
    def confusion(self) -> Tensor:
        """(C, C) int64: images of the row's class that were taken for the column's."""
        size = len(self.classes)
        return torch.bincount(self.truth * size + self.predicted, minlength=size**2).view(size, size)

    @property
    def dataset(self) -> Tensor:
        """(C,) int64: test images of each class."""
        return torch.bincount(self.truth, minlength=len(self.classes))

    @property
    def right(self) -> Tensor:
        """(C,) int64: those that were taken for what they are."""
        return torch.bincount(self.truth[self.truth == self.predicted], minlength=len(self.classes))

    @property
    def accuracy(self) -> Tensor:
        """(C,) float64 in [0, 1]; NaN for a class without test images."""
        return self.right.double() / self.dataset

    def intervals(self) -> Tensor:
        """The 95 % intervals of the accuracies (C, 2), by Wilson's score; NaN for a class without test images."""
        none = float("nan"), float("nan")
        counts = zip(self.right.tolist(), self.dataset.tolist(), strict=True)
        return torch.tensor([wilson(right, n) if n else none for right, n in counts], dtype=torch.float64)

    def pairs(self, most: int = _PAIRS) -> list[Confused]:
        """The pairs of classes that were confused most often; of equal ones the first in the order of the classes."""
        size = len(self.classes)
        wrong = (self.truth * size + self.predicted)[self.truth != self.predicted]
        pair, count = torch.unique(wrong, return_counts=True)
        count, order = count.sort(descending=True, stable=True)
        found = zip(pair[order[:most]].tolist(), count[:most].tolist(), strict=True)
        return [Confused(place // size, place % size, number) for place, number in found]

    def describe(self) -> dict[str, Any]:
        """For a record: every class by its name, with its accuracy, and the pairs that were confused most often."""
        rows = zip(self.classes, self.dataset.tolist(), self.accuracy.tolist(), strict=True)
        by_class = [
            {"name": name, "n": n, "value": value, "low": low, "high": high, "interval": "Wilson"}
            for (name, n, value), (low, high) in zip(rows, self.intervals().tolist(), strict=True)
        ]
        confused = [
            {"truth": self.classes[pair.truth], "predicted": self.classes[pair.predicted], "images": pair.dataset}
            for pair in self.pairs()
        ]
        return {"metric": self.metric, "classes": by_class, "confused": confused}


def hardest_images(answers: Predictions, most: int) -> Tensor:
    """Rows (at most `most`,) of the wrong answers whose true class came last.

    Among equal ones the order is mixed, and always the same: the first images of a folder are all of one class.
    """
    mixed = torch.randperm(len(answers.rank), generator=torch.Generator().manual_seed(0))
    order = mixed[answers.rank[mixed].argsort(descending=True, stable=True)][:most]
    return order[answers.rank[order] > 0]
