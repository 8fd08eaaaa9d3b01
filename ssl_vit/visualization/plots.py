"""Matplotlib charts in one style: lines over blocks, matrices, figures as images."""

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
COLORS = {MODEL: "#0072b2", RANDOM: "#9a9a9a"}  # distinguishable with color blindness
OTHER = "#d55e00"
_MAX_CELLS = 6  # rows and columns up to which the values of a matrix are written into its cells
_DPI = 200  # of figures 7 inches wide: 1,400 pixels


@contextmanager
def new_figure(height: float, width: float = 7) -> Iterator[Figure]:
    """Provide an empty figure of this size in inches, in the same style whatever the user's settings are."""
    with matplotlib.style.context(["default", {"font.size": 9, "axes.edgecolor": INK, "text.color": INK}]):
        yield Figure(figsize=(width, height), layout="constrained")


def figure_to_image(figure: Figure, dpi: int = _DPI) -> Image.Image:
    """Render a figure as an RGB image."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]


def head_chart(values: dict[str, Tensor], label: str, *, line: tuple[str, float] | None = None) -> Image.Image:
    """Draw a dot for each head of each block, and a line through the means of the heads.

    The values are (blocks, heads) by model, the first of which is drawn on top; the label is that of the vertical axis,
    with its unit; `line` has the name and the height of a reference level.
    """
    with new_figure(3.4) as figure:
        axes = figure.subplots()
        for name, points in reversed(values.items()):
            blocks, heads = points.shape
            offsets = (np.arange(heads) - (heads - 1) / 2) * min(0.08, 0.6 / heads)
            dot, width = (2.2, 1.0) if name == RANDOM else (4.0, 1.5)
            x = np.arange(blocks)[:, None] + offsets
            axes.plot(x, points.numpy(), "o", ms=dot, color=COLORS[name], mew=0)
            mean = points.mean(1).numpy()
            axes.plot(range(blocks), mean, lw=width, color=COLORS[name], alpha=0.7, label=f"{name} (dots: heads)")
        if line:
            axes.axhline(line[1], color=INK, lw=1, ls="--", label=line[0])
        style_block_axis(axes, label)
        axes.set_ylim(0, 1.03 * axes.get_ylim()[1])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        return figure_to_image(figure)


def style_block_axis(axes: Axes, label: str) -> None:
    """Label the axes of a chart over the blocks."""
    axes.set_xlabel("block (0 is the first)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    style_axes(axes)


def style_axes(axes: Axes) -> None:
    """Remove the upper and the right frame, and add a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)


def plot_matrices(plots: Sequence[tuple[str, Tensor, str, str]], label: str) -> Image.Image:
    """Draw matrices side by side: title, values, row and column labels; one color scale from 0 to 1, with a label."""
    with new_figure(3.4) as figure:
        grid = figure.subplots(1, len(plots), squeeze=False)[0]
        for axes, (title, values, row_label, column_label) in zip(grid, plots, strict=True):
            image = axes.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
            axes.set(title=title, ylabel=row_label, xlabel=column_label)
            axes.title.set_fontsize(9)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if max(values.shape) <= _MAX_CELLS:
                for (row, column), value in np.ndenumerate(values.numpy()):
                    color = INK if value > 0.5 else "white"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
        figure.colorbar(image, ax=grid, label=label, shrink=0.8)
        return figure_to_image(figure)
