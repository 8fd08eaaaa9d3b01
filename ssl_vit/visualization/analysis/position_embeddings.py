"""How alike the position embeddings of a model are: which places it holds to be near each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.models.backbone import Backbone
from ssl_vit.visualization.image_grid import TitledFigure
from ssl_vit.visualization.plots import figure_to_image, new_figure, plain_style

_TILES = 14  # a side at most: of finer grids some places are shown


def position_similarity(backbone: Backbone) -> Tensor | None:
    """Cosines between the position embeddings of all patches; those of class token and registers are left out.

    Returns:
        (rows, columns, rows, columns) float32, or None where positions are not learned.
    """
    embeddings = backbone.position_embeddings()
    if embeddings is None:
        return None
    unit = F.normalize(embeddings.float().cpu().flatten(0, 1), dim=-1)  # (N, D)
    return (unit @ unit.T).view(*embeddings.shape[:2], *embeddings.shape[:2])


def position_panel(similarity: Tensor) -> TitledFigure:
    """A tile for each place, with the cosine of its embedding to those of all places.

    Args:
        similarity: (rows, columns, rows, columns).
    """
    rows, columns = similarity.shape[:2]
    down, across = _spread(rows), _spread(columns)
    tiles, side = _tiled(similarity, down, across)
    with plain_style():
        figure = new_figure(min(7.0, 1.2 + 4.8 * tiles.shape[0] / tiles.shape[1]))
        axes = figure.subplots()
        drawn = axes.imshow(tiles.numpy(), cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_xticks([(place + 0.5) * side[1] for place in range(len(across))], [str(column) for column in across])
        axes.set_yticks([(place + 0.5) * side[0] for place in range(len(down))], [str(row) for row in down])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("row of the patch")
        axes.set_xlabel("column of the patch")
        figure.colorbar(drawn, ax=axes, label="cosine of the position embeddings", shrink=0.8)
        image = figure_to_image(figure)
    some = f" (of the {rows} x {columns}, {len(down)} x {len(across)} are shown)" if len(down) < rows else ""
    text = (
        f"One tile for each place of the grid{some}: within it, the cosine of that place's position embedding to those "
        "of all places. A spot around the tile's own place means that the model has learned which patches are "
        "neighbors; a cross, that it knows rows and columns. Of the weights alone, no image is needed."
    )
    return TitledFigure("Similarity of the position embeddings", image, text)


def _tiled(similarity: Tensor, down: list[int], across: list[int]) -> tuple[Tensor, tuple[int, int]]:
    """One matrix of all tiles, NaN between them, and the height and width of a tile with its gap."""
    zoom = max(1, 60 // max(similarity.shape[2:]))
    tiles = similarity[down][:, across].repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    gap = max(1, max(tiles.shape[2:]) // 12)
    framed = F.pad(tiles, (0, gap, 0, gap), value=math.nan)
    side = (framed.shape[2], framed.shape[3])
    return framed.transpose(1, 2).reshape(len(down) * side[0], len(across) * side[1]), side


def _spread(count: int) -> list[int]:
    """So many places of a side, or fewer of them evenly spread."""
    places: list[int] = torch.linspace(0, count - 1, min(count, _TILES)).round().long().tolist()
    return places
