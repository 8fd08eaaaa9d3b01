"""Pieces that sheets of pictures are put together from: pictures at a tile's size, and texts that fit beside them."""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageFont
from torch import Tensor

INK, PAPER = (32, 32, 32), (255, 255, 255)


def fitted(picture: Tensor, longer: int) -> tuple[int, int]:
    """Height and width of a picture whose longer side is brought to `longer` pixels."""
    height, width = picture.shape[-2:]
    factor = longer / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def as_image(picture: Tensor, size: tuple[int, int]) -> Image.Image:
    """A picture (C, H, W) uint8 in RGB at another height and width."""
    rgb = picture.expand(3, -1, -1) if len(picture) == 1 else picture
    image = Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())
    return image if (image.height, image.width) == size else image.resize((size[1], size[0]), Image.Resampling.BICUBIC)


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
