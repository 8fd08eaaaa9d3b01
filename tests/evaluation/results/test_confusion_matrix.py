"""What a model takes for what, in numbers and as one image, from two classes to a thousand."""

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


def answers(count, classes, *, right=0.6, seed=0):
    """Of images 0, 1, ..., their classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(count) % classes
    rank = torch.randint(1, classes, (count,), generator=generator)
    rank[torch.rand(count, generator=generator) < right] = 0
    predicted = torch.where(rank == 0, truth, (truth + rank) % classes)
    return Predictions(torch.arange(count), truth, predicted, rank)


def mistakes(given, classes, metric):
    return ConfusionSummary(metric, classes, given.truth, given.predicted)


def names(classes):
    return [f"class {number}" for number in range(classes)]


def test_confusion_counts_every_pair():
    given = answers(500, 7)
    slow = torch.zeros(7, 7, dtype=torch.int64)
    for truth, predicted in zip(given.truth.tolist(), given.predicted.tolist(), strict=True):
        slow[truth, predicted] += 1
    found = mistakes(given, names(7), "top-1")
    assert torch.equal(found.confusion, slow)
    assert torch.equal(found.confusion.sum(dim=1), found.dataset)
    assert torch.equal(found.confusion.diagonal(), found.right)
    for label, (low, high) in enumerate(found.intervals().tolist()):
        right, n = int(slow[label, label]), int(slow[label].sum())
        assert float(found.accuracy[label]) == right / n
        assert (low, high) == wilson(right, n)


def test_pairs_are_those_confused_most_in_a_fixed_order():
    truth = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    predicted = torch.tensor([1, 1, 0, 1, 2, 0, 1])
    given = Predictions(torch.arange(7), truth, predicted, (truth != predicted).long())
    found = mistakes(given, ["a", "b", "c"], "top-1")
    assert [tuple(pair) for pair in found.pairs()] == [(0, 1, 2), (1, 0, 1), (2, 0, 1), (2, 1, 1)]
    assert found.describe()["confused"][0] == {"truth": "a", "predicted": "b", "images": 2}


def test_a_class_without_test_images_has_no_accuracy():
    given = Predictions(*(torch.tensor(part) for part in ([0, 1], [0, 2], [0, 2], [0, 0])))
    found = mistakes(given, ["a", "b", "c"], "top-1")
    assert found.accuracy.isnan().tolist() == [False, True, False]
    row = found.describe()["classes"][1]
    assert (row["name"], row["n"]) == ("b", 0)
    assert np.isnan([row["value"], row["low"], row["high"]]).all()


def test_the_hardest_are_the_wrong_ones_with_the_true_class_last():
    given = answers(300, 12, right=0.5)
    rows = hardest_images(given, 20)
    found = given.rank[rows].tolist()
    assert found == sorted(given.rank.tolist(), reverse=True)[:20]
    assert torch.equal(rows, hardest_images(given, 20))
    assert len(rows.unique()) == 20
    assert len(hardest_images(answers(300, 12, right=1.1), 20)) == 0


@pytest.mark.parametrize(("classes", "right", "side"), [(2, 0.7, 40), (2, 1.1, 40), (24, 0.3, 300), (1000, 0.1, 33)])
def test_a_sheet_is_drawn_of_any_number_of_classes(classes, right, side, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, side, side // 2), generator=generator, dtype=torch.uint8)
    dataset = ArrayDataset(images, torch.zeros(32, dtype=torch.int64), [], title="images")
    given = answers(2000, classes, right=right)
    given = given._replace(place=given.place % 32)
    long = [
        f"a class with $odd$ _signs_ {{x}} \\ and a name that is far too long {number}" for number in range(classes)
    ]
    tiles = hardest_tiles(given, dataset)
    assert len(tiles) == (0 if right > 1 else ROWS * COLUMNS)
    plot_confusion(tmp_path / "sheet.png", mistakes(given, long, "top-1"), tiles, "a $title$")
    with Image.open(tmp_path / "sheet.png") as sheet:
        drawn = np.asarray(sheet.convert("L"))
    assert drawn.shape[1] == 1320
    assert (drawn < 128).mean() > 0.002  # something is drawn
    assert (drawn[:, -3:] > 250).all()  # and nothing beyond the edge
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_images_that_have_gone_since_are_left_out(sample, tmp_path):
    shutil.copytree(sample / "test", tmp_path / "test")
    dataset = scan_image_folder(tmp_path / "test")
    given = answers(len(dataset), 12, right=0.0)
    dataset.path(int(hardest_images(given, 1))).unlink()
    assert len(hardest_tiles(given, dataset)) == ROWS * COLUMNS - 1
