"""Figure of the errors of a classifier: accuracy by class, confusions, and the hardest images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, UnreadableImageError
from ssl_vit.evaluation.results.confusion_matrix import ConfusionSummary, hardest_images
from ssl_vit.evaluation.results.eval_result import Predictions
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.visualization.image_grid import captioned, fit_size, image_grid, page, text_image, to_pil
from ssl_vit.visualization.plots import INK, figure_to_image, new_figure

MAX_CLASSES = 24  # or pairs of classes
COLUMNS, ROWS = 8, 2  # of the hardest images
TILE_SIDE = 148  # pixels of a tile's longer side
DPI = 110
_BAR, _MEAN = "#4878a8", "#c44e52"


class HardImage(NamedTuple):
    """A misclassified image."""

    image: Tensor  # (3, H, W) uint8
    target: int
    predicted: int
    rank: int  # number of classes with a higher score than the true one


def read_hardest_images(predictions: Predictions, dataset: ImageDataset) -> list[HardImage]:
    """Read the hardest images, except for those that can no longer be read."""
    found = []
    for row in hardest_images(predictions, ROWS * COLUMNS).tolist():
        try:
            image = dataset.read(int(predictions.indices[row]), 3)
        except UnreadableImageError:
            continue
        target, predicted, rank = predictions.target[row], predictions.predicted[row], predictions.rank[row]
        found.append(HardImage(image, int(target), int(predicted), int(rank)))
    return found


def plot_confusion(path: Path, summary: ConfusionSummary, hardest: list[HardImage], title: str) -> None:
    """Draw the figure into a PNG file; the title is one line that names model and evaluation."""
    height = max(2.6, 1.0 + 0.2 * min(len(summary.classes), MAX_CLASSES))
    with new_figure(0.5 + height, 12) as figure, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of class names in other scripts
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.05)
        figure.suptitle(f"{title}, {len(summary.target):,} images", fontsize=12, parse_math=False)
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        _plot_accuracy(left, summary)
        if len(summary.classes) <= MAX_CLASSES:
            _plot_matrix(right, summary)
        else:
            _plot_pairs(right, summary)
        chart = figure_to_image(figure, DPI)
    tiles = []
    for image, target, predicted, rank in hardest:
        names = _shorten(summary.classes[target], 18), f"→ {_shorten(summary.classes[predicted], 18)}"
        lines = [*names, f"rank {rank + 1} of {len(summary.classes)}" if rank < len(summary.classes) else "no vote"]
        tiles.append(captioned(to_pil(image, fit_size(image, TILE_SIDE)), lines, max_width=TILE_SIDE))
    parts = [chart]
    if tiles:
        rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
        parts.append(text_image(["Hardest images: true class → predicted class, and the rank of the true class"]))
        parts.append(image_grid(rows, gap=16, align_bottom=True))
    else:
        parts.append(text_image(["No image is misclassified"]))
    with atomic_write(path) as file:
        page(parts).save(file, format="PNG")


def _plot_accuracy(axes: Axes, summary: ConfusionSummary) -> None:
    """Draw bars of the accuracies with their intervals, the lowest first; of many classes only the lowest."""
    accuracy, interval = summary.accuracy, summary.intervals()
    tested = (~accuracy.isnan()).nonzero().squeeze(1)
    order = tested[accuracy[tested].argsort(stable=True)][:MAX_CLASSES]
    value = accuracy[order]
    error = (interval[order] - value[:, None]).abs().T.numpy()
    rows = range(len(order))
    axes.barh(rows, value.numpy(), color=_BAR, height=0.72)
    axes.errorbar(value.numpy(), rows, xerr=error, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    mean = float(summary.correct.sum() / len(summary.target))
    axes.axvline(mean, color=_MEAN, linewidth=1, linestyle="--")
    names = [_shorten(summary.classes[label]) for label in order.tolist()]
    axes.set_yticks(rows, names, fontsize=8, parse_math=False)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    which = "by class" if len(order) == len(tested) else f"of the {len(order)} lowest of {len(tested):,} classes"
    axes.set_title(f"Accuracy {which}, 95 % intervals; all: {100 * mean:.1f} %", fontsize=9)


def _plot_matrix(axes: Axes, summary: ConfusionSummary) -> None:
    """Draw the confusion matrix in percent of each row."""
    share = 100 * summary.matrix / summary.totals[:, None]  # NaN in the row of a class without images
    size = len(share)
    few = size <= 12
    axes.imshow(share.sqrt().numpy(), cmap="Blues", vmin=0, vmax=10, aspect="auto" if size > 2 else "equal")
    for row, column in (share >= 0.5).nonzero().tolist():
        value = float(share[row, column])
        color = "white" if value > 36 else INK
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8 if few else 6, color=color)
    axes.set_yticks(range(size), [_shorten(name) for name in summary.classes], fontsize=8, parse_math=False)
    names = [_shorten(name, 14) for name in summary.classes]
    axes.set_xticks(range(size), names, fontsize=8, rotation=45 if few else 90, parse_math=False)
    for label in axes.get_xticklabels():
        label.set(ha="right" if few else "center", rotation_mode="anchor" if few else "default")
    axes.tick_params(length=0)
    axes.set_title("True class (row) and predicted class (column), % of the row", fontsize=9)


def _plot_pairs(axes: Axes, summary: ConfusionSummary) -> None:
    """Draw bars of the most frequent confusions."""
    pairs = summary.pairs(MAX_CLASSES)
    totals = summary.totals.tolist()
    rows = range(len(pairs))
    axes.barh(rows, [pair.images for pair in pairs], color=_BAR, height=0.72)
    names = [f"{_shorten(summary.classes[a])} → {_shorten(summary.classes[b])}" for a, b, _ in pairs]
    axes.set_yticks(rows, names, fontsize=8, parse_math=False)
    for row, pair in enumerate(pairs):
        axes.text(pair.images, row, f" {pair.images} of {totals[pair.target]}", va="center", fontsize=8)
    axes.set_ylim(max(1, len(pairs)) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.set_title("Most frequent confusions: true → predicted class", fontsize=9)


def _shorten(name: str, length: int = 22) -> str:
    """Remove the middle of a long name, as names often differ at their start or at their end."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"
