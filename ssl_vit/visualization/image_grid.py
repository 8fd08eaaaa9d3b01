"""Pieces that sheets of images are put together from: images at a tile's size, and texts that fit beside them."""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageFont
from torch import Tensor

INK, PAPER = (32, 32, 32), (255, 255, 255)


def fitted(image: Tensor, longer: int) -> tuple[int, int]:
    """Height and width of an image whose longer side is brought to `longer` pixels."""
    height, width = image.shape[-2:]
    factor = longer / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def as_image(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """An image (C, H, W) uint8 in RGB at another height and width."""
    rgb = image.expand(3, -1, -1) if len(image) == 1 else image
    tile = Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())
    return tile if (tile.height, tile.width) == size else tile.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def shortened(line: str, width: int) -> str:
    """The end of a line that is wider than so many pixels, in the font of 13 pixels."""
    short = line
    while font(13).getlength(short) > width:
        short = f"…{short.lstrip('…')[1:]}"
    return short


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Of so many pixels."""
    return ImageFont.load_default(size)
