"""One image of what a model gets wrong: accuracy by class, what is taken for what, and the hardest images."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, UnreadableImageError
from ssl_vit.evaluation.results.confusion_matrix import ConfusionSummary, hardest_images
from ssl_vit.evaluation.results.eval_result import Predictions
from ssl_vit.runtime.atomic_io import atomic_write

SHOWN = 24  # classes, or pairs of classes, at most
COLUMNS, ROWS = 8, 2  # of the hardest images
_SIDE = 256  # pixels of a tile at most
_INK, _BAR, _MEAN = "#202020", "#4878a8", "#c44e52"


class Tile(NamedTuple):
    """An image and what was answered of it."""

    image: Tensor  # (3, S, S) uint8
    truth: int
    predicted: int
    rank: int  # how many classes came before the true one


def hardest_tiles(answers: Predictions, dataset: ImageDataset) -> list[Tile]:
    """The hardest images that can still be read."""
    tiles = []
    for row in hardest_images(answers, ROWS * COLUMNS).tolist():
        try:
            image = dataset.read(int(answers.indices[row]), 3)
        except UnreadableImageError:
            continue
        place = (int(values[row]) for values in (answers.target, answers.predicted, answers.rank))
        tiles.append(Tile(_square(image), *place))
    return tiles


def plot_confusion(path: Path, mistakes: ConfusionSummary, tiles: list[Tile], title: str) -> None:
    """Draw the sheet into a PNG file.

    Args:
        path: Of the file.
        mistakes: Of all test images.
        tiles: The hardest of them.
        title: One line that says whose mistakes they are.
    """
    shown = min(len(mistakes.classes), SHOWN)
    height = max(2.6, 1.0 + 0.2 * shown)
    below = 1.75 * max(1, math.ceil(len(tiles) / COLUMNS)) + 0.45
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of class names in other scripts
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.05)  # inches
        figure = Figure(figsize=(12, 0.5 + height + below), layout=layout)
        figure.suptitle(f"{title}, {len(mistakes.target):,} images", fontsize=12, color=_INK, parse_math=False)
        halves = figure.add_gridspec(2, 1, height_ratios=[height, below])
        upper, lower = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
        bars, matrix = upper.subplots(1, 2, width_ratios=[1, 1.15])
        _draw_classes(bars, mistakes)
        if len(mistakes.classes) <= SHOWN:
            _draw_confusion(matrix, mistakes)
        else:
            _draw_pairs(matrix, mistakes)
        _draw_tiles(lower, mistakes.classes, tiles)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _draw_classes(axes: Axes, mistakes: ConfusionSummary) -> None:
    """Bars of the accuracies, the lowest first, with their intervals; of many classes only the lowest."""
    accuracy, interval = mistakes.accuracy, mistakes.intervals()
    tested = (~accuracy.isnan()).nonzero().squeeze(1)
    order = tested[accuracy[tested].argsort(stable=True)][:SHOWN]
    value = accuracy[order]
    spread = (interval[order] - value[:, None]).abs().T.numpy()
    place = range(len(order))
    axes.barh(place, value.numpy(), color=_BAR, height=0.72)
    axes.errorbar(value.numpy(), place, xerr=spread, fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
    mean = float(mistakes.correct.sum() / len(mistakes.target))
    axes.axvline(mean, color=_MEAN, linewidth=1, linestyle="--")
    names = [_short(mistakes.classes[label]) for label in order.tolist()]
    axes.set_yticks(place, names, fontsize=8, parse_math=False)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    which = "by class" if len(order) == len(tested) else f"of the {len(order)} lowest of {len(tested):,} classes"
    axes.set_title(f"Accuracy {which}, 95 % intervals; all: {100 * mean:.1f} %", fontsize=9, color=_INK)


def _draw_confusion(axes: Axes, mistakes: ConfusionSummary) -> None:
    """The confusion as percent of each row."""
    share = 100 * mistakes.matrix / mistakes.totals[:, None]  # NaN in the row of no images
    size = len(share)
    axes.imshow(share.sqrt().numpy(), cmap="Blues", vmin=0, vmax=10, aspect="auto" if size > 2 else "equal")
    for row, column in (share >= 0.5).nonzero().tolist():
        value = float(share[row, column])
        color = "white" if value > 36 else _INK
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8 if size <= 12 else 6, color=color)
    axes.set_yticks(range(size), [_short(name) for name in mistakes.classes], fontsize=8, parse_math=False)
    names = [_short(name, 14) for name in mistakes.classes]
    axes.set_xticks(range(size), names, fontsize=8, rotation=45 if size <= 12 else 90, parse_math=False)
    for label in axes.get_xticklabels():
        label.set(ha="right" if size <= 12 else "center", rotation_mode="anchor" if size <= 12 else "default")
    axes.tick_params(length=0)
    axes.set_title("True class (row) taken for (column), % of the row", fontsize=9, color=_INK)


def _draw_pairs(axes: Axes, mistakes: ConfusionSummary) -> None:
    """Bars of the pairs of classes that were confused most often."""
    pairs = mistakes.pairs(SHOWN)
    totals = mistakes.totals.tolist()
    place = range(len(pairs))
    axes.barh(place, [pair.images for pair in pairs], color=_BAR, height=0.72)
    names = [f"{_short(mistakes.classes[a])} → {_short(mistakes.classes[b])}" for a, b, _ in pairs]
    axes.set_yticks(place, names, fontsize=8, parse_math=False)
    for row, pair in enumerate(pairs):
        axes.text(pair.images, row, f" {pair.images} of {totals[pair.target]}", va="center", fontsize=8, color=_INK)
    axes.set_ylim(max(1, len(pairs)) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.set_title("Classes confused most often: true → predicted", fontsize=9, color=_INK)


def _draw_tiles(figure: SubFigure, classes: list[str], tiles: list[Tile]) -> None:
    """The hardest images with their true and their predicted class."""
    if not tiles:
        figure.suptitle("No image is misclassified", fontsize=9, color=_INK)
        return
    text = "Hardest images: true class → predicted class, and the place in which the true class came"
    figure.suptitle(text, fontsize=9, color=_INK)
    grid = figure.subplots(math.ceil(len(tiles) / COLUMNS), COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, tile in zip(grid.flat, tiles, strict=False):
        axes.imshow(tile.image.permute(1, 2, 0).numpy())
        lines = [_short(classes[tile.truth], 18), f"→ {_short(classes[tile.predicted], 18)}"]
        lines.append(f"place {tile.rank + 1} of {len(classes)}")
        axes.set_title("\n".join(lines), fontsize=8, color=_INK, pad=3, parse_math=False)


def _short(name: str, most: int = 22) -> str:
    """The name, its middle left out where it is long: both its ends tell names apart."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def _square(image: Tensor) -> Tensor:
    """An image (3, H, W) uint8, a large one reduced, at the top of a white square: so captions stand in a row."""
    height, width = image.shape[-2:]
    if (factor := _SIDE / max(height, width)) < 1:
        height, width = max(1, round(height * factor)), max(1, round(width * factor))
        image = F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]
    side = max(height, width)
    left = (side - width) // 2
    return F.pad(image, (left, side - width - left, 0, side - height), value=255)
