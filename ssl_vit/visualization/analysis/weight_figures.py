"""Figures of weights: similarity of the position embeddings, principal components of the patch filters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor
from torchvision.utils import make_grid

from ssl_vit.models.backbone import Backbone
from ssl_vit.visualization.image_grid import TitledFigure
from ssl_vit.visualization.plots import COLORS, figure_to_image, new_figure, style_axes

MAX_COMPONENTS = 28  # as many as the ViT paper shows
_COLUMNS = 7
_MAX_SIDE = 14  # positions shown along a side; of finer grids evenly spaced ones


def position_similarity(backbone: Backbone) -> Tensor | None:
    """Compute the cosines (rows, columns, rows, columns) float32 between the position embeddings of all patches.

    Return None if the model has no learned position embeddings.
    """
    embeddings = backbone.position_embeddings()
    if embeddings is None:
        return None
    unit = F.normalize(embeddings.float().cpu().flatten(0, 1), dim=-1)  # (N, D)
    return (unit @ unit.T).view(*embeddings.shape[:2], *embeddings.shape[:2])


def position_figure(similarity: Tensor) -> TitledFigure:
    """Draw a tile for each position, with the cosines (rows, columns, rows, columns) to all positions' embeddings."""
    rows, columns = similarity.shape[:2]
    down, across = (torch.linspace(0, side - 1, min(side, _MAX_SIDE)).round().long() for side in (rows, columns))
    zoom = max(1, 60 // max(rows, columns))
    gap = max(1, max(rows, columns) * zoom // 12)
    tiles = similarity[down][:, across].repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    tiles = F.pad(tiles, (0, gap, 0, gap), value=math.nan)  # (down, across, height, width)
    height, width = tiles.shape[2:]
    matrix = tiles.transpose(1, 2).reshape(len(down) * height, len(across) * width)
    with new_figure(min(7.0, 1.2 + 4.8 * matrix.shape[0] / matrix.shape[1])) as figure:
        axes = figure.subplots()
        drawn = axes.imshow(matrix.numpy(), cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_xticks([(tile + 0.5) * width for tile in range(len(across))], map(str, across.tolist()))
        axes.set_yticks([(tile + 0.5) * height for tile in range(len(down))], map(str, down.tolist()))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(ylabel="row of the patch", xlabel="column of the patch")
        figure.colorbar(drawn, ax=axes, label="cosine of the position embeddings", shrink=0.8)
        image = figure_to_image(figure)
    some = f" (of the {rows} x {columns}, {len(down)} x {len(across)} are shown)" if len(down) < rows else ""
    text = (
        f"One tile for each position of the grid{some}: the cosines between its position embedding and those of all "
        "positions. A spot at the tile's own position means that the model has learned which patches are neighbors; "
        "a cross, that it has learned rows and columns. Computed from the weights alone."
    )
    return TitledFigure("Similarity of the position embeddings", image, text)


class FilterComponents(NamedTuple):
    """Principal components of D filters, by descending variance."""

    filters: Tensor  # (K, C, p, p) of norm 1; the entry of the largest magnitude is positive
    explained: Tensor  # (all components,) share of the variance, sums to 1


def filter_components(weight: Tensor) -> FilterComponents:
    """Compute the PCA of a patch embedding (Dosovitskiy et al. 2021, arXiv 2010.11929, figure 7, left).

    Each of the D filters (D, C, p, p) is a point in C·p·p dimensions; their mean is subtracted.
    """
    points = weight.detach().double().cpu().flatten(1)
    _, strengths, components = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    count = min(MAX_COMPONENTS, len(components))
    components = components[:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    filters = (components * largest.sign()).float().view(count, *weight.shape[1:])
    return FilterComponents(filters, (strengths.square() / strengths.square().sum()).float())


def filter_figure(components: dict[str, FilterComponents]) -> TitledFigure:
    """Draw the components of the first model as tiles, and the variance that they explain in each model."""
    first = next(iter(components.values()))
    side, lines = first.filters.shape[-1], math.ceil(len(first.filters) / _COLUMNS)
    with new_figure(0.95 * lines + 2.4) as figure:
        upper, lower = figure.subplots(2, 1, height_ratios=[0.95 * lines, 2.4])
        _plot_filters(upper, first.filters)
        _plot_explained(lower, components)
        image = figure_to_image(figure)
    share = float(first.explained[: len(first.filters)].sum())
    text = (
        f"The {len(first.filters)} strongest principal components of the {side} x {side} filters that embed patches, "
        "each scaled to its own full range. Trained filters show colors, edges and waves, from coarse to fine; random "
        f"filters show noise. Together these components explain {share:.0%} of the filters' variance. Computed from "
        "the weights alone."
    )
    return TitledFigure("Principal components of the patch filters", image, text)


def _plot_filters(axes: Axes, filters: Tensor) -> None:
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    tiles = (filters - low) / (high - low)  # (K, C, p, p) in [0, 1]
    if tiles.shape[1] != 3:
        tiles = tiles.mean(1, keepdim=True)
    zoom = max(1, 96 // tiles.shape[-1])
    tiles = tiles.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    size, gap = tiles.shape[-1], tiles.shape[-1] // 4
    grid = make_grid(tiles, nrow=_COLUMNS, padding=gap, pad_value=1.0)  # (3, H, W)
    for index in range(len(tiles)):
        x, y = index % _COLUMNS * (size + gap) + gap, index // _COLUMNS * (size + gap) + gap
        axes.text(x + size / 2, y - gap / 10, str(index + 1), ha="center", va="bottom", fontsize=7.5)
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()


def _plot_explained(axes: Axes, components: dict[str, FilterComponents]) -> None:
    for name, (_, explained) in reversed(components.items()):
        percent = 100 * explained.cumsum(0).numpy()
        axes.plot(range(1, len(explained) + 1), percent, ".-", ms=4, lw=1, color=COLORS[name], label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set(xlabel="components, by descending variance", ylabel="explained variance (%)", ylim=(0, 102))
    axes.legend(frameon=False)
    style_axes(axes)
