"""Query images with their nearest neighbors beside them, one row per query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageOps
from torch import Tensor

from ssl_vit.visualization.image_grid import PAPER, captioned, fit_size, image_grid, legend, page, to_pil

TILE_SIDE = 112  # pixels of a tile's longer side
_BORDER = 4
_SAME, _OTHER = (0, 140, 100), (213, 94, 0)  # distinguishable with color blindness
_QUERY_GAP = Image.new("RGB", (16, 1), PAPER)  # between query and neighbors


class NeighborTile(NamedTuple):
    """One image of a row."""

    image: Tensor  # (C, H, W) uint8
    caption: list[str]  # at most two lines
    same_class: bool | None  # as the query; None for the query itself, or if a class is unknown


def neighbor_figure(rows: Sequence[Sequence[NeighborTile]]) -> Image.Image:
    """Draw each query and its neighbors, the nearest first; border colors show whether they share its class."""
    tiles = [[_draw_tile(tile) for tile in row] for row in rows]
    grid = image_grid(
        [[query, _QUERY_GAP, *neighbors] for query, *neighbors in tiles],
        column_titles=["query", "", "nearest, with cosine similarities"],
        align_bottom=True,
    )
    if all(tile.same_class is None for row in rows for tile in row):
        return page([grid])
    return page([grid, legend({"class of the query": _SAME, "another class": _OTHER})])


def _draw_tile(tile: NeighborTile) -> Image.Image:
    color = {None: PAPER, True: _SAME, False: _OTHER}[tile.same_class]
    image = ImageOps.expand(to_pil(tile.image, fit_size(tile.image, TILE_SIDE)), _BORDER, color)
    return captioned(image, tile.caption, max_width=TILE_SIDE)
