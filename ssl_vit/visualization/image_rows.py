"""Figures with one row of images per query or video: nearest neighbors, and tracked objects in their colors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ssl_vit.models.attention_maps import upsample_mask
from ssl_vit.visualization.image_grid import PAPER, captioned, fit_size, image_grid, legend, page, text_image, to_pil

NEIGHBOR_SIDE, FRAME_SIDE = 112, 240  # pixels of a tile's longer side
FRAMES_PER_VIDEO = 5
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
    tiles = [[_draw_neighbor(tile) for tile in row] for row in rows]
    grid = image_grid(
        [[query, _QUERY_GAP, *neighbors] for query, *neighbors in tiles],
        column_titles=["query", "", "nearest, with cosine similarities"],
        align_bottom=True,
    )
    if all(tile.same_class is None for row in rows for tile in row):
        return page([grid])
    return page([grid, legend({"class of the query": _SAME, "another class": _OTHER})])


def _draw_neighbor(tile: NeighborTile) -> Image.Image:
    color = {None: PAPER, True: _SAME, False: _OTHER}[tile.same_class]
    image = ImageOps.expand(to_pil(tile.image, fit_size(tile.image, NEIGHBOR_SIDE)), _BORDER, color)
    return captioned(image, tile.caption, max_width=NEIGHBOR_SIDE)


def tracking_figure(videos: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Arrange the tiles of each video, by its name, in a row."""
    return page([image_grid([[text_image([name], max_width=110), *tiles] for name, tiles in videos.items()], gap=6)])


def draw_objects(frame: Tensor, numbers: Tensor, palette: Sequence[int]) -> Image.Image:
    """Draw a tile of a frame (C, H, W) uint8 with each object in its color and a darker background.

    The object of each pixel is `numbers` (H, W) int64 in [0, 255], 0 for background; its color is three of the 768
    values of the palette: red, green and blue.
    """
    size = fit_size(frame, FRAME_SIDE)
    image, small = to_pil(frame, size), upsample_mask(numbers, size)
    colors = torch.tensor(palette).view(-1, 3)[small].to(torch.uint8)
    colored = Image.blend(image, Image.fromarray(colors.numpy()), 0.6)
    foreground = Image.fromarray((small > 0).numpy()).convert("L")
    return Image.composite(colored, image.point(lambda value: value * 3 // 4), foreground)
