"""Grids of image tiles with captions, legends and color bars: the layout of every figure that shows images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

INK, PAPER = (32, 32, 32), (255, 255, 255)
COLOR_MAP = "inferno"  # of all heat maps
GAP = 8  # pixels between tiles
FONT = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")  # Latin, Greek and Cyrillic
RGB = tuple[int, int, int]


class TitledFigure(NamedTuple):
    """A figure with its title and the text that explains it."""

    title: str
    image: Image.Image  # RGB
    text: str  # how to read it; also the alternative text on a web page


def fit_size(image: Tensor, longer_side: int) -> tuple[int, int]:
    """Return the height and width of an image (..., H, W) scaled to this longer side in pixels."""
    height, width = image.shape[-2:]
    factor = longer_side / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def to_pil(image: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Convert an image (C, H, W), uint8 or float in [0, 1], to RGB of this height and width (bicubic)."""
    levels = (image * 255).round().byte() if image.is_floating_point() else image
    tile = Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    if size is None or (tile.height, tile.width) == size:
        return tile
    return tile.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def text_image(lines: Sequence[str], *, size: int = 13, max_width: int | None = None) -> Image.Image:
    """Draw lines of text; of a line wider than `max_width` pixels only the end is shown."""
    shown = [line if max_width is None else _truncate_start(line, size, max_width) for line in lines]
    width = math.ceil(max((_font(size).getlength(line) for line in shown), default=0))
    step = round(1.25 * size) + 1
    image = Image.new("RGB", (max(1, width), max(1, step * len(shown))), PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(shown):
        draw.text((0, step * number), line, INK, font=_font(size))
    return image


def captioned(image: Image.Image, lines: Sequence[str], *, size: int = 13, max_width: int | None = None) -> Image.Image:
    """Put lines of text below an image."""
    return stack([image, text_image(lines, size=size, max_width=max_width)], gap=3)


def stack(images: Sequence[Image.Image], *, horizontal: bool = False, gap: int = GAP) -> Image.Image:
    """Put images below each other, or side by side."""
    if horizontal:
        return image_grid([images], gap=gap)
    return image_grid([[image] for image in images], gap=gap)


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    column_titles: Sequence[str] = (),
    title_size: int = 13,
    gap: int = GAP,
    align_bottom: bool = False,
) -> Image.Image:
    """Arrange tiles in rows and columns.

    Args:
        rows: Tiles of any sizes; a column is as wide as its widest tile, a row as high as its highest one.
        column_titles: Text above each column, of one or more lines.
        title_size: Height of their letters in pixels.
        gap: Pixels between rows and columns.
        align_bottom: Align the tiles of a row at their bottom instead of their top.
    """
    titles = [text_image(title.splitlines(), size=title_size) for title in column_titles]
    columns = max(map(len, rows))
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    lefts = [sum(widths[:column]) + column * gap for column in range(columns)]
    header = max((title.height for title in titles), default=-gap) + gap
    width = max([lefts[-1] + widths[-1], *(left + title.width for left, title in zip(lefts, titles, strict=False))])
    grid = Image.new("RGB", (width, header + sum(heights) + (len(rows) - 1) * gap), PAPER)
    for left, title in zip(lefts, titles, strict=False):
        grid.paste(title, (left, 0))
    top = header
    for row, height in zip(rows, heights, strict=True):
        for left, tile in zip(lefts, row, strict=False):
            grid.paste(tile, (left, top + (height - tile.height if align_bottom else 0)))
        top += height + gap
    return grid


def page(parts: Sequence[Image.Image]) -> Image.Image:
    """Put the parts of a figure below each other, with a margin around them."""
    return ImageOps.expand(stack(parts), GAP, PAPER)


def legend(colors: Mapping[str, RGB]) -> Image.Image:
    """Draw a frame in each color with its meaning beside it."""
    entries = []
    for text, color in colors.items():
        entries += [ImageOps.expand(Image.new("RGB", (8, 8), PAPER), 2, color), text_image([f"{text}   "])]
    return stack(entries, horizontal=True)


def color_bar(ticks: Mapping[float, str], *, width: int = 180) -> Image.Image:
    """Draw the color map of heat maps with texts at fractions of its width."""
    ramp = matplotlib.colormaps[COLOR_MAP](np.linspace(0, 1, width), bytes=True)[None, :, :3]
    texts = {fraction: text_image([text]) for fraction, text in ticks.items()}
    right = max(round(fraction * width) + text.width for fraction, text in texts.items())
    bar = Image.new("RGB", (max(width, right), 32), PAPER)
    bar.paste(Image.fromarray(ramp.repeat(12, axis=0)), (0, 0))
    for fraction, text in texts.items():
        bar.paste(text, (round(fraction * width), 14))
    return bar


def apply_color_map(values: Tensor) -> Image.Image:
    """Color values (H, W) in [0, 1], pixel by pixel."""
    return Image.fromarray(matplotlib.colormaps[COLOR_MAP](values.numpy(), bytes=True)[..., :3])


def draw_outline(image: Image.Image, mask: Tensor, color: RGB) -> None:
    """Paint the border pixels of a mask (H, W) bool of the image's size, on its inner side; thicker on large images."""
    filled = Image.fromarray(mask.numpy()).convert("L")
    thickness = max(1, round(max(image.size) / 300))
    inner = filled.filter(ImageFilter.BoxBlur(thickness)).point([0] * 255 + [255])  # fast at any thickness
    image.paste(color, (0, 0), ImageChops.subtract(filled, inner))


def _truncate_start(line: str, size: int, max_width: int) -> str:
    short = line
    while _font(size).getlength(short) > max_width:
        short = f"…{short.lstrip('…')[1:]}"
    return short


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size - 1)  # wider than most
