"""Confusion matrix, accuracy by class and hardest images."""

import numpy as np
import torch

from ssl_vit.evaluation.results.confusion_matrix import ConfusionSummary, hardest_images
from ssl_vit.evaluation.results.eval_result import Predictions
from ssl_vit.evaluation.results.statistics import wilson
from tests.helpers.predictions import make_predictions


def summarize(given, classes, metric):
    return ConfusionSummary(metric, classes, given.target, given.predicted)


def names(classes):
    return [f"class {number}" for number in range(classes)]


def test_matrix_counts_every_pair():
    given = make_predictions(500, 7)
    slow = torch.zeros(7, 7, dtype=torch.int64)
    for target, predicted in zip(given.target.tolist(), given.predicted.tolist(), strict=True):
        slow[target, predicted] += 1
    found = summarize(given, names(7), "top-1")
    assert torch.equal(found.matrix, slow)
    assert torch.equal(found.matrix.sum(dim=1), found.totals)
    assert torch.equal(found.matrix.diagonal(), found.correct)
    for label, (low, high) in enumerate(found.intervals().tolist()):
        right, n = int(slow[label, label]), int(slow[label].sum())
        assert float(found.accuracy[label]) == right / n
        assert (low, high) == wilson(right, n)


def test_pairs_lists_the_most_frequent_in_a_fixed_order():
    target = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    predicted = torch.tensor([1, 1, 0, 1, 2, 0, 1])
    given = Predictions(torch.arange(7), target, predicted, (target != predicted).long())
    found = summarize(given, ["a", "b", "c"], "top-1")
    assert [tuple(pair) for pair in found.pairs()] == [(0, 1, 2), (1, 0, 1), (2, 0, 1), (2, 1, 1)]
    assert found.to_dict()["confusions"][0] == {"target": "a", "predicted": "b", "images": 2}


def test_accuracy_of_a_class_without_test_images_is_nan():
    given = Predictions(*(torch.tensor(part) for part in ([0, 1], [0, 2], [0, 2], [0, 0])))
    found = summarize(given, ["a", "b", "c"], "top-1")
    assert found.accuracy.isnan().tolist() == [False, True, False]
    row = found.to_dict()["classes"][1]
    assert (row["name"], row["n"]) == ("b", 0)
    assert np.isnan([row["value"], row["low"], row["high"]]).all()


def test_hardest_images_are_those_with_the_true_class_last():
    given = make_predictions(300, 12, right=0.5)
    rows = hardest_images(given, 20)
    found = given.rank[rows].tolist()
    assert found == sorted(given.rank.tolist(), reverse=True)[:20]
    assert torch.equal(rows, hardest_images(given, 20))
    assert len(rows.unique()) == 20
    assert len(hardest_images(make_predictions(300, 12, right=1.1), 20)) == 0
