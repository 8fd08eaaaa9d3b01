"""Pieces that the panels are drawn with: colours, charts over the blocks, heat maps, and figures as pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from ssl_vit.attention.summary import NETWORK, RANDOM

INK = "#202020"
COLOURS = {NETWORK: "#0072b2", RANDOM: "#9a9a9a"}  # told apart by the colour-blind, too
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


def as_picture(figure: Figure) -> Image.Image:
    """The figure as an RGB picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return Image.open(buffer).convert("RGB")


def head_chart(values: dict[str, Tensor], label: str, *, line: tuple[str, float] | None = None) -> Image.Image:
    """A point for each head of each block, the heads' means joined.

    Args:
        values: (blocks, heads) by network; the first is drawn last, on top.
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
                axes.plot(place, points[:, head].numpy(), "o", ms=2.2 if small else 4, color=COLOURS[name], mew=0)
            mean = points.mean(1).numpy()
            axes.plot(
                range(blocks),
                mean,
                "-",
                lw=1 if small else 1.5,
                color=COLOURS[name],
                alpha=0.7,
                label=f"{name} (dots: heads)",
            )
        if line:
            axes.axhline(line[1], color=INK, lw=1, ls="--", label=line[0])
        over_blocks(axes, label)
        axes.set_ylim(bottom=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        return as_picture(figure)


def over_blocks(axes: Axes, label: str) -> None:
    """Name the axes of a chart over the blocks, and take away what it does not need."""
    axes.set_xlabel(BLOCK)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lean(axes)


def lean(axes: Axes) -> None:
    """Only the axes that are read, and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)


def square_maps(
    maps: Sequence[tuple[str, Tensor, str, str]], label: str, *, span: tuple[float, float], colours: str
) -> Image.Image:
    """Matrices side by side that share one colour scale.

    Args:
        maps: Title, matrix (rows, columns), and what rows and columns are.
        label: Of the colour scale.
        span: Its ends; values beyond are shown as the ends.
        colours: A colour map of matplotlib.
    """
    with plain_style():
        figure = new_figure(3.4)
        drawn = None
        grid = figure.subplots(1, len(maps), squeeze=False)[0]
        for axes, (title, matrix, rows, columns) in zip(grid, maps, strict=True):
            if max(matrix.shape) <= _WRITTEN:
                _write_values(axes, matrix, span)
            drawn = axes.imshow(matrix.numpy(), cmap=colours, vmin=span[0], vmax=span[1], origin="lower", aspect="auto")
            axes.set_title(title, fontsize=9)
            axes.set_ylabel(rows)
            axes.set_xlabel(columns)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        assert drawn is not None
        figure.colorbar(drawn, ax=grid, label=label, shrink=0.8)
        return as_picture(figure)


def _write_values(axes: Axes, matrix: Tensor, span: tuple[float, float]) -> None:
    """Into each cell its value, dark on the bright end of the colours."""
    middle = sum(span) / 2
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            colour = INK if value > middle else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
