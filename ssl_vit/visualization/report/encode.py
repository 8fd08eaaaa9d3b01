"""Encode images, maps and masks as short texts inside of the page."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ssl_vit.models.attention_maps import upsample_mask
from ssl_vit.visualization.report.schema import ReportData

QUALITY = 76  # of WebP: its artifacts cannot be seen at the sizes of the page
OUTLINE_SIDE = 256  # cells of a mask's longer side that its outline is drawn with
FINE = 80  # cells of the longer side from which on they are not worth seeing
CELL = 72  # largest side of a thumbnail in a sprite


class Embedded(NamedTuple):
    """An image as an element of the page can show it."""

    uri: str
    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return round(self.width / self.height, 4)


class Sprite(NamedTuple):
    """Many thumbnails as one image, each in the upper left corner of its cell."""

    uri: str
    cell: int  # pixels of a cell's side
    columns: int
    sizes: list[tuple[int, int]]  # width and height of each


def photograph(image: Image.Image, side: int) -> Embedded:
    """Encode an image with its longer side reduced to at most `side` pixels."""
    small = _reduced(image, side)
    return Embedded(_webp(small), small.width, small.height)


def drawing(image: Image.Image, side: int) -> Embedded:
    """Encode a figure, without loss where that is no larger (lines and flat colors)."""
    small = _reduced(image, side)
    few_colors = small.convert("RGB").getcolors(small.width * small.height // 20) is not None
    return Embedded(_webp(small, lossless=few_colors), small.width, small.height)


def sprite(images: list[Image.Image]) -> Sprite:
    """All thumbnails side by side, none enlarged."""
    small = [_reduced(image, CELL) for image in images]
    cell = max(max(image.size) for image in small)
    columns = math.ceil(math.sqrt(len(small)))
    grid = Image.new("RGB", (columns * cell, math.ceil(len(small) / columns) * cell))
    for place, image in enumerate(small):
        grid.paste(image, (place % columns * cell, place // columns * cell))
    return Sprite(_webp(grid), cell, columns, [image.size for image in small])


def map_bytes(maps: Tensor) -> tuple[str, list[float]]:
    """Attention maps in 12 bits: level / 4095 is the square root of the share of the map's largest value.

    Square roots leave the weak patches, where the border of a mask runs, finer steps than the strong ones. With 8 bits,
    masks would change to the eye where one patch towers above many that are nearly equal.

    Args:
        maps: (heads, rows, columns), not negative.

    Returns:
        Three bytes for two patches in base64, the higher bits first, and the largest value of each map.
    """
    tops = maps.flatten(1).amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)  # (heads,)
    levels = (maps / tops[:, None, None]).sqrt().mul(4095).round().int().numpy().flatten()
    first, second = np.pad(levels, (0, levels.size % 2)).reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8)
    return as_bytes(packed), [float(f"{top:.6g}") for top in tops.tolist()]


def count_bytes(counts: Tensor) -> str:
    """Encode counts as unsigned 32-bit integers, little-endian, in base64."""
    return as_bytes(counts.numpy().astype("<u4"))


def as_bytes(array: npt.NDArray[Any]) -> str:
    """Encode the bytes of an array, row by row, in base64."""
    return _base64(array.tobytes())


def outline(mask: Tensor) -> str:
    """Return the border of a mask (rows, columns) bool as an SVG path in a square of side 1.

    Its closed loops run along the cells' sides; filled by the even-odd rule they are the mask. A mask of many cells is
    drawn with at most 256 a side, and without steps.
    """
    rows, columns = mask.shape
    factor = min(1.0, OUTLINE_SIDE / max(rows, columns))
    size = max(1, round(rows * factor)), max(1, round(columns * factor))
    loops = _loops(upsample_mask(mask, size).numpy())
    return " ".join(_loop_path(_smoothed(loop) if max(size) >= FINE else loop, size) for loop in loops)


def utf8_safe(text: str) -> str:
    """Return a text that UTF-8 can encode: other bytes of file names are escaped as in JSON."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def as_json(content: object) -> Markup:
    """Plain containers as JSON that may stand in a script element, whatever characters their texts hold."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)  # ASCII: odd characters are escaped
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _reduced(image: Image.Image, side: int) -> Image.Image:
    factor = side / max(image.size)
    if factor >= 1:
        return image
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _webp(image: Image.Image, *, lossless: bool = False) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=QUALITY, method=4, lossless=lossless)
    return f"data:image/webp;base64,{_base64(file.getvalue())}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _loops(mask: npt.NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """Corners (row, column) of the closed loops around a mask, the mask on their right."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    sides = (
        (padded[:-2, 1:-1], (0, 0), (0, 1)),  # above: from the upper left corner to the upper right one
        (padded[1:-1, 2:], (0, 1), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (1, 0)),
        (padded[1:-1, :-2], (1, 0), (0, 0)),
    )
    for beyond, start, end in sides:
        for row, column in np.argwhere(inside & ~beyond).tolist():
            following.setdefault((row + start[0], column + start[1]), []).append((row + end[0], column + end[1]))
    loops = []
    while following:
        corner = next(iter(following))
        loop = []
        while corner in following:
            loop.append(corner)
            nexts = following[corner]
            corner_after = nexts.pop()
            if not nexts:
                del following[corner]
            corner = corner_after
        loops.append(loop)
    return loops


def _smoothed(loop: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Replace corners by the midpoints of the sides: steps become slopes, and every cell's center stays inside."""
    return [
        ((here[0] + after[0]) / 2, (here[1] + after[1]) / 2)
        for here, after in zip(loop, [*loop[1:], loop[0]], strict=True)
    ]


def _loop_path(loop: Sequence[tuple[float, float]], size: tuple[int, int]) -> str:
    """Only the corners where the direction changes."""
    turns = [
        here
        for before, here, after in zip([loop[-1], *loop[:-1]], loop, [*loop[1:], loop[0]], strict=True)
        if (here[0] - before[0], here[1] - before[1]) != (after[0] - here[0], after[1] - here[1])
    ]
    points = [f"{_short(column / size[1])} {_short(row / size[0])}" for row, column in turns]
    return f"M{'L'.join(points)}Z"


def _short(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".").removeprefix("0") or "0"


MOST_BYTES = 10_000_000  # of a page
_LEAST = 8  # pixels of a side


def downscale_images(content: ReportData) -> ReportData:
    """Return the report with images of half their size."""
    plane = content.feature_map
    return content._replace(
        attended=[one._replace(image=_half(one.image)) for one in content.attended],
        segmented=[one._replace(image=_half(one.image)) for one in content.segmented],
        neighbors=[[near._replace(image=_half(near.image)) for near in row] for row in content.neighbors],
        feature_map=plane and plane._replace(images=[_half(image) for image in plane.images]),
        panels=[panel._replace(image=_half(panel.image)) for panel in content.panels],
        reconstructions=[panel._replace(image=_half(panel.image)) for panel in content.reconstructions],
    )


def _half(image: Image.Image) -> Image.Image:
    width, height = (max(_LEAST, side // 2) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
