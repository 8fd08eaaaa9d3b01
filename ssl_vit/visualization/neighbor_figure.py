"""A sheet of images with their nearest beside them: a row per query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from ssl_vit.visualization.image_grid import INK, PAPER, as_image, fitted, font, shortened

SIDE = 112  # pixels of a tile's longer side
_CELL = SIDE + 20, SIDE + 44  # width and height with border and caption
_APART = 24  # between query and neighbors
_BORDER = 4
_SAME, _OTHER = (0, 140, 100), (213, 94, 0)  # told apart by the color-blind, too


class Tile(NamedTuple):
    """One image of a row."""

    image: Tensor  # (C, H, W) uint8
    lines: list[str]  # below it, two at most
    same_class: bool | None  # as the query's; None for the query itself, or where one of the two is not known


def neighbor_sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Rows of the query and then its neighbors, the nearest first; borders say whose class is the query's."""
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * _CELL[0] + _APART + 20, len(rows) * _CELL[1] + 54), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), "query", INK, font=font(13))
    draw.text((10 + _CELL[0] + _APART, 8), "nearest, with their cosines", INK, font=font(13))
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            corner = 10 + column * _CELL[0] + (_APART if column else 0), 30 + row * _CELL[1]
            _draw_tile(sheet, draw, tile, corner)
    if any(tile.same_class is not None for tiles in rows for tile in tiles):
        for place, (color, text) in enumerate(((_SAME, "the query's class"), (_OTHER, "another class"))):
            left, top = 10 + 150 * place, sheet.height - 22
            draw.rectangle((left, top + 2, left + 12, top + 14), outline=color, width=_BORDER)
            draw.text((left + 20, top), text, INK, font=font(13))
    return sheet


def _draw_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, corner: tuple[int, int]) -> None:
    image = as_image(tile.image, fitted(tile.image, SIDE))
    left, top = corner[0] + (SIDE - image.width) // 2 + _BORDER, corner[1] + SIDE - image.height + _BORDER
    sheet.paste(image, (left, top))
    if tile.same_class is not None:
        box = left - _BORDER, top - _BORDER, left + image.width + _BORDER - 1, top + image.height + _BORDER - 1
        draw.rectangle(box, outline=_SAME if tile.same_class else _OTHER, width=_BORDER)
    for line, text in enumerate(tile.lines):
        place = corner[0] + _BORDER, corner[1] + SIDE + 2 * _BORDER + 15 * line
        draw.text(place, shortened(text, SIDE), INK, font=font(13))
