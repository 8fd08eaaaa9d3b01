"""Figure of the errors of a classifier, from two classes to a thousand."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.torchvision_datasets import ArrayDataset
from ssl_vit.evaluation.results.confusion_matrix import ConfusionSummary, hardest_images
from ssl_vit.visualization.confusion_figure import COLUMNS, ROWS, plot_confusion, read_hardest_images
from tests.helpers.predictions import make_predictions


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
    hardest = read_hardest_images(given, dataset)
    assert len(hardest) == (0 if right > 1 else ROWS * COLUMNS)
    summary = ConfusionSummary("top-1", long, given.target, given.predicted)
    plot_confusion(tmp_path / "figure.png", summary, hardest, "a $title$")
    with Image.open(tmp_path / "figure.png") as image:
        drawn = np.asarray(image.convert("L"))
    assert drawn.shape[1] == 1336
    assert (drawn < 128).mean() > 0.002  # something is drawn
    assert (drawn[:, -3:] > 250).all()  # and nothing beyond the edge
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def test_read_hardest_images_excludes_missing_images(sample, tmp_path):
    shutil.copytree(sample / "test", tmp_path / "test")
    dataset = scan_image_folder(tmp_path / "test")
    given = make_predictions(len(dataset), 12, right=0.0)
    dataset.path(int(hardest_images(given, 1))).unlink()
    assert len(read_hardest_images(given, dataset)) == ROWS * COLUMNS - 1
