"""Encode images, maps and masks as short texts inside of the page."""

from __future__ import annotations

import base64
import io
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from contourpy import contour_generator
from PIL import Image
from torch import Tensor

from ssl_vit.models.attention_maps import upsample_mask

QUALITY = 76  # of WebP: its artifacts cannot be seen at the sizes of the page
OUTLINE_SIDE = 256  # cells of the longer side of the grid that a mask's outline is drawn on
CELL = 72  # largest side of a thumbnail in a sprite


class EncodedImage(NamedTuple):
    """An image as an element of the page can show it."""

    uri: str
    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return round(self.width / self.height, 4)


def encode_photo(image: Image.Image, side: int) -> EncodedImage:
    """Encode an image with its longer side reduced to at most `side` pixels."""
    small = _reduce(image, side)
    return EncodedImage(_webp(small), small.width, small.height)


def encode_figure(image: Image.Image, side: int) -> EncodedImage:
    """Encode a figure, without loss where that is no larger (lines and flat colors)."""
    small = _reduce(image, side)
    few_colors = small.convert("RGB").getcolors(small.width * small.height // 20) is not None
    return EncodedImage(_webp(small, lossless=few_colors), small.width, small.height)


def encode_sprite(images: list[Image.Image]) -> dict[str, Any]:
    """Encode all thumbnails as one image, each in the upper left corner of its cell, none enlarged.

    Returns:
        `uri`, `cell` (pixels of a cell's side), `columns`, and `sizes`: width and height of each thumbnail.
    """
    small = [_reduce(image, CELL) for image in images]
    cell = max(max(image.size) for image in small)
    columns = math.ceil(math.sqrt(len(small)))
    grid = Image.new("RGB", (columns * cell, math.ceil(len(small) / columns) * cell))
    for index, image in enumerate(small):
        grid.paste(image, (index % columns * cell, index // columns * cell))
    return {"uri": _webp(grid), "cell": cell, "columns": columns, "sizes": [image.size for image in small]}


def encode_maps(maps: Tensor) -> tuple[str, list[float]]:
    """Encode attention maps in 16 bits: level / 65535 is the square root of the share of the map's largest value.

    Square roots leave the weak patches, where the border of a mask runs, finer steps than the strong ones.

    Args:
        maps: (heads, rows, columns), not negative.

    Returns:
        Levels as little-endian integers in base64, and the largest value of each map.
    """
    maxima = maps.flatten(1).amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)  # (heads,)
    levels = (maps / maxima[:, None, None]).sqrt().mul(65535).round()
    return encode_array(levels.numpy().astype("<u2")), [float(f"{value:.6g}") for value in maxima.tolist()]


def encode_array(array: npt.NDArray[Any]) -> str:
    """Encode the bytes of an array, row by row, in base64."""
    return base64.b64encode(array.tobytes()).decode("ascii")


def outline_path(mask: Tensor) -> str:
    """Return the border of a mask (rows, columns) bool as an SVG path of closed loops in a square of side 1,000.

    Filled by the even-odd rule they are the mask, resampled to 256 cells on its longer side.
    """
    rows, columns = mask.shape
    factor = OUTLINE_SIDE / max(rows, columns)
    size = max(1, round(rows * factor)), max(1, round(columns * factor))
    cells = np.pad(upsample_mask(mask, size).numpy().astype(np.float64), 1)  # cell i has its center at i - 0.5
    scale = 1000 / size[1], 1000 / size[0]
    return "".join(_loop_path((np.asarray(loop)[:-1] - 0.5) * scale) for loop in contour_generator(z=cells).lines(0.5))


def _loop_path(loop: npt.NDArray[np.float64]) -> str:
    """Return a closed loop of points (N, 2) as a path of the corners where the direction changes."""
    before, after = loop - np.roll(loop, 1, axis=0), np.roll(loop, -1, axis=0) - loop
    corners = loop[np.abs(before - after).max(axis=1) > 1e-6]
    return f"M{'L'.join(f'{x:.0f} {y:.0f}' for x, y in corners)}Z"


def _reduce(image: Image.Image, side: int) -> Image.Image:
    factor = side / max(image.size)
    if factor >= 1:
        return image
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _webp(image: Image.Image, *, lossless: bool = False) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=QUALITY, method=4, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
