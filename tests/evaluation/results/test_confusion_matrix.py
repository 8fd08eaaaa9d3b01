"""Confusion matrix and its figure, from two classes to a thousand."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.torchvision_datasets import ArrayDataset
from ssl_vit.evaluation.results.confusion_matrix import ConfusionSummary, hardest_images
from ssl_vit.evaluation.results.eval_result import Predictions
from ssl_vit.evaluation.results.statistics import wilson
from ssl_vit.visualization.confusion_figure import COLUMNS, ROWS, hardest_tiles, plot_confusion


def make_predictions(count, classes, *, right=0.6, seed=0):
    """Make predictions for images 0, 1, ... of classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(count) % classes
    rank = torch.randint(1, classes, (count,), generator=generator)
    rank[torch.rand(count, generator=generator) < right] = 0
    predicted = torch.where(rank == 0, target, (target + rank) % classes)
    return Predictions(torch.arange(count), target, predicted, rank)


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


@pytest.mark.parametrize(("classes", "right", "side"), [(2, 0.7, 40), (2, 1.1, 40), (24, 0.3, 300), (1000, 0.1, 33)])
def test_plot_confusion_of_any_number_of_classes(classes, right, side, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, side, side // 2), generator=generator, dtype=torch.uint8)
    dataset = ArrayDataset(images, torch.zeros(32, dtype=torch.int64), [], title="images")
    given = make_predictions(2000, classes, right=right)
    given = given._replace(indices=given.indices % 32)
    long = [
        f"a class with $odd$ _signs_ {{x}} \\ and a name that is far too long {number}" for number in range(classes)
    ]
    tiles = hardest_tiles(given, dataset)
    assert len(tiles) == (0 if right > 1 else ROWS * COLUMNS)
    plot_confusion(tmp_path / "figure.png", summarize(given, long, "top-1"), tiles, "a $title$")
    with Image.open(tmp_path / "figure.png") as image:
        drawn = np.asarray(image.convert("L"))
    assert drawn.shape[1] == 1320
    assert (drawn < 128).mean() > 0.002  # something is drawn
    assert (drawn[:, -3:] > 250).all()  # and nothing beyond the edge
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def test_hardest_tiles_excludes_missing_images(sample, tmp_path):
    shutil.copytree(sample / "test", tmp_path / "test")
    dataset = scan_image_folder(tmp_path / "test")
    given = make_predictions(len(dataset), 12, right=0.0)
    dataset.path(int(hardest_images(given, 1))).unlink()
    assert len(hardest_tiles(given, dataset)) == ROWS * COLUMNS - 1
