"""Pieces that the panels are drawn with: colors, charts over the blocks, heat maps, and figures as images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL, RANDOM

INK = "#202020"
COLORS = {MODEL: "#0072b2", RANDOM: "#9a9a9a"}  # told apart by the color-blind, too
OTHER = "#d55e00"
BLOCK = "block (0 is the first)"
_WRITTEN = 6  # rows and columns up to which a matrix's values are written into its cells
_DPI = 200  # of figures 7 inches wide: 1,400 pixels, sharp where a page shows them half as wide


@contextmanager
def plain_style() -> Iterator[None]:
    """Whatever the user's own settings of matplotlib are, panels look the same."""
    with matplotlib.style.context(["default", {"font.size": 9, "axes.edgecolor": INK, "text.color": INK}]):
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of 7 inches by so many."""
    return Figure(figsize=(7, height), layout="constrained")


def figure_to_image(figure: Figure) -> Image.Image:
    """The figure as an RGB image."""
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]


def head_chart(values: dict[str, Tensor], label: str, *, line: tuple[str, float] | None = None) -> Image.Image:
    """A point for each head of each block, the heads' means joined.

    Args:
        values: (blocks, heads) by model; the first is drawn last, on top.
        label: Of the vertical axis, with its unit.
        line: Name and height of a level to compare with.
    """
    with plain_style():
        figure = new_figure(3.4)
        axes = figure.subplots()
        for name, points in reversed(values.items()):
            blocks, heads = points.shape
            apart = min(0.08, 0.6 / heads)
            small = name == RANDOM
            for head in range(heads):
                place = [block + (head - (heads - 1) / 2) * apart for block in range(blocks)]
                axes.plot(place, points[:, head].numpy(), "o", ms=2.2 if small else 4, color=COLORS[name], mew=0)
            mean = points.mean(1).numpy()
            width = 1 if small else 1.5
            axes.plot(range(blocks), mean, lw=width, color=COLORS[name], alpha=0.7, label=f"{name} (dots: heads)")
        if line:
            axes.axhline(line[1], color=INK, lw=1, ls="--", label=line[0])
        block_axis(axes, label)
        axes.set_ylim(0, 1.03 * axes.get_ylim()[1])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        return figure_to_image(figure)


def block_axis(axes: Axes, label: str) -> None:
    """Name the axes of a chart over the blocks, and take away what it does not need."""
    axes.set_xlabel(BLOCK)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    style_axes(axes)


def style_axes(axes: Axes) -> None:
    """Only the axes that are read, and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)


def square_maps(
    maps: Sequence[tuple[str, Tensor, str, str]], label: str, *, span: tuple[float, float], colors: str
) -> Image.Image:
    """Matrices side by side that share one color scale.

    Args:
        maps: Title, matrix (rows, columns), and what rows and columns are.
        label: Of the color scale.
        span: Its ends; values beyond are shown as the ends.
        colors: A color map of matplotlib.
    """
    with plain_style():
        figure = new_figure(3.4)
        drawn = None
        grid = figure.subplots(1, len(maps), squeeze=False)[0]
        for axes, (title, matrix, rows, columns) in zip(grid, maps, strict=True):
            if max(matrix.shape) <= _WRITTEN:
                _write_values(axes, matrix, span)
            drawn = axes.imshow(matrix.numpy(), cmap=colors, vmin=span[0], vmax=span[1], origin="lower", aspect="auto")
            axes.set_title(title, fontsize=9)
            axes.set_ylabel(rows)
            axes.set_xlabel(columns)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        assert drawn is not None
        figure.colorbar(drawn, ax=grid, label=label, shrink=0.8)
        return figure_to_image(figure)


def _write_values(axes: Axes, matrix: Tensor, span: tuple[float, float]) -> None:
    """Into each cell its value, dark on the bright end of the colors."""
    middle = sum(span) / 2
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            color = INK if value > middle else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
