"""What the first layer looks for: the principal components of the patch-embedding filters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor

from ssl_vit.visualization.image_grid import TitledFigure
from ssl_vit.visualization.plots import COLORS, figure_to_image, new_figure, plain_style, style_axes

SHOWN = 28  # components, as many as the ViT paper shows
_COLUMNS = 7


class FilterComponents(NamedTuple):
    """Principal components of D filters, the strongest first."""

    filters: Tensor  # (K, C, p, p) of length 1; the entry that is largest in size is positive
    explained: Tensor  # (all components,) share of the variance, sums to 1


def filter_components(weight: Tensor) -> FilterComponents:
    """The PCA of a patch embedding (Dosovitskiy et al. 2021, arXiv 2010.11929, figure 7, left).

    Args:
        weight: (D, C, p, p); each of the D filters is a point of C·p·p dimensions, their mean is taken off.
    """
    points = weight.detach().double().cpu().flatten(1)
    _, strengths, components = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    count = min(SHOWN, len(components))
    components = components[:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    filters = (components * largest.sign()).float().view(count, *weight.shape[1:])
    return FilterComponents(filters, (strengths.square() / strengths.square().sum()).float())


def filter_panel(components: dict[str, FilterComponents]) -> TitledFigure:
    """The first model's components as tiles, and the variance that they explain in each model."""
    first = next(iter(components.values()))
    side, lines = first.filters.shape[-1], math.ceil(len(first.filters) / _COLUMNS)
    with plain_style():
        figure = new_figure(0.95 * lines + 2.4)
        upper, lower = figure.subplots(2, 1, height_ratios=[0.95 * lines, 2.4])
        _draw_tiles(upper, first.filters, lines)
        _draw_explained(lower, components)
        image = figure_to_image(figure)
    share = float(first.explained[: len(first.filters)].sum())
    text = (
        f"The {len(first.filters)} strongest principal components of the {side} x {side} filters that turn patches "
        "into tokens, each stretched to its own full range. Trained filters show colors, edges and waves, from coarse "
        "to fine; random ones show noise. Together these explain "
        f"{share:.0%} of the filters' variance. Of the weights alone, no image is needed."
    )
    return TitledFigure("Principal components of the patch filters", image, text)


def _draw_tiles(axes: Axes, filters: Tensor, lines: int) -> None:
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    tiles = (filters - low) / (high - low)  # (K, C, p, p) in [0, 1]
    if tiles.shape[1] != 3:
        tiles = tiles.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    zoom = max(1, 96 // tiles.shape[-1])
    tiles = tiles.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    gap = tiles.shape[-1] // 4
    side = tiles.shape[-1] + gap
    sheet = tiles.new_ones(3, lines * side, _COLUMNS * side)
    for place, tile in enumerate(tiles):
        upper, left = place // _COLUMNS * side + gap, place % _COLUMNS * side + gap
        sheet[:, upper : upper + tile.shape[1], left : left + tile.shape[2]] = tile
        axes.text(left + tile.shape[2] / 2, upper - gap / 10, str(place + 1), ha="center", va="bottom", fontsize=7.5)
    axes.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()


def _draw_explained(axes: Axes, components: dict[str, FilterComponents]) -> None:
    for name, (_, explained) in reversed(components.items()):
        places = range(1, len(explained) + 1)
        axes.plot(places, 100 * explained.cumsum(0).numpy(), ".-", ms=4, lw=1, color=COLORS[name], label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("components, the strongest first")
    axes.set_ylabel("explained variance (%)")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False)
    style_axes(axes)
