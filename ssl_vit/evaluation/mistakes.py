"""What a network takes for what: the confusion of its classes, the accuracy of each, the pictures it finds hardest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.evaluation.intervals import wilson
from ssl_vit.evaluation.records import Answers

_PAIRS = 25  # of classes, that a record lists


class Confused(NamedTuple):
    """How often one class was taken for another."""

    truth: int
    predicted: int
    pictures: int


class Mistakes(NamedTuple):
    """The answers of one evaluation, class by class."""

    metric: str
    classes: list[str]
    confusion: Tensor  # (C, C) int64: pictures of the row's class that were taken for the column's

    @property
    def accuracy(self) -> Tensor:
        """(C,) float64 in [0, 1]; NaN for a class without test pictures."""
        return self.confusion.diagonal().double() / self.confusion.sum(dim=1)

    def intervals(self) -> Tensor:
        """The 95 % intervals of the accuracies (C, 2), by Wilson's score; NaN for a class without test pictures."""
        none = float("nan"), float("nan")
        counts = zip(self.confusion.diagonal().tolist(), self.confusion.sum(dim=1).tolist(), strict=True)
        return torch.tensor([wilson(right, n) if n else none for right, n in counts], dtype=torch.float64)

    def pairs(self, most: int = _PAIRS) -> list[Confused]:
        """The pairs of classes that were confused most often; of equal ones the first in the order of the classes."""
        wrong = self.confusion - self.confusion.diagonal().diag()
        count, place = wrong.flatten().sort(descending=True, stable=True)
        size = len(self.classes)
        found = zip(place[:most].tolist(), count[:most].tolist(), strict=True)
        return [Confused(where // size, where % size, number) for where, number in found if number]

    def describe(self) -> dict[str, Any]:
        """For a record: every class by its name, with its accuracy, and the pairs that were confused most often."""
        rows = zip(self.classes, self.confusion.sum(dim=1).tolist(), self.accuracy.tolist(), strict=True)
        by_class = [
            {"name": name, "n": n, "value": value, "low": low, "high": high, "interval": "Wilson"}
            for (name, n, value), (low, high) in zip(rows, self.intervals().tolist(), strict=True)
        ]
        confused = [
            {"truth": self.classes[pair.truth], "predicted": self.classes[pair.predicted], "pictures": pair.pictures}
            for pair in self.pairs()
        ]
        return {"metric": self.metric, "classes": by_class, "confused": confused}


def mistakes(answers: Answers, classes: list[str], metric: str) -> Mistakes:
    """Count what was taken for what.

    Args:
        answers: Whose labels are places in `classes`.
        classes: The names of all C classes.
        metric: The name of the metric that counts the same answers.
    """
    size = len(classes)
    pairs = answers.truth * size + answers.predicted
    return Mistakes(metric, classes, torch.bincount(pairs, minlength=size**2).view(size, size))


def hardest(answers: Answers, most: int) -> Tensor:
    """Rows (at most `most`,) of the wrong answers whose true class came last.

    Among equal ones the order is mixed, and always the same: the first pictures of a folder are all of one class.
    """
    mixed = torch.randperm(len(answers.rank), generator=torch.Generator().manual_seed(0))
    order = mixed[answers.rank[mixed].argsort(descending=True, stable=True)][:most]
    return order[answers.rank[order] > 0]
