"""Attention drawn over the picture it belongs to, at the picture's size, and sheets of many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from ssl_vit.attention.masks import mass_mask, to_pixels
from ssl_vit.attention.metrics import count_truth, iou
from ssl_vit.attention.segmentation import Segmentation
from ssl_vit.evaluation.tiles import INK, PAPER, as_image, fitted, font, shortened

TILE = 240  # pixels of a tile's longer side
GAP = 10
COLOURS = "inferno"
MASK, TRUTH = (70, 225, 255), (255, 60, 200)  # outlines: cyan stands out from all colours of the heat
LEAST_TOP = 6.0  # times uniform: a colour scale that ends lower would make noise look like attention


class Example(NamedTuple):
    """One picture with all that can be drawn of it. The heads come first, their mean last; no map without attention."""

    picture: Tensor  # (C, H, W) uint8
    maps: Tensor  # (heads + 1, rows, columns) float, each sums to 1
    masks: Tensor  # (heads + 1, rows, columns) bool
    truth: Tensor | None  # (H, W) bool: the given object mask
    ious: list[float] | None  # heads + 1, of the masks with the truth
    methods: Mapping[str, Segmentation]  # what others than attention find: of patches, or of pixels
    method_ious: Mapping[str, float]


def make_example(
    picture: Tensor,
    maps: Tensor | None,
    mass: float,
    truth: Tensor | None,
    *,
    counted: Tensor | None = None,
    methods: Mapping[str, Segmentation] | None = None,
) -> Example:
    """What can be drawn of a picture (C, H, W) uint8.

    Args:
        picture: Of any size.
        maps: (heads, rows, columns); None: attention is not drawn.
        mass: Share of the attention that a mask holds.
        truth: The given object (H, W) bool, if any.
        counted: (H, W) bool, False where a pixel is void.
        methods: What other methods find, at least one where there are no maps.
    """
    maps = torch.zeros(0, 1, 1) if maps is None else torch.cat([maps, maps.mean(0, keepdim=True)])
    masks, methods = mass_mask(maps, mass), methods or {}
    if truth is None:
        return Example(picture, maps, masks, None, None, methods, {})
    truths = {grid: count_truth(truth, grid, counted) for grid in {_grid(maps), *map(_grid, _softs(methods))}}
    of_methods = {name: iou(found.mask, truths[_grid(found.mask)]).item() for name, found in methods.items()}
    return Example(picture, maps, masks, truth, iou(masks, truths[_grid(maps)]).tolist(), methods, of_methods)


def _softs(methods: Mapping[str, Segmentation]) -> list[Tensor]:
    return [found.soft for found in methods.values()]


def _grid(values: Tensor) -> tuple[int, int]:
    return values.shape[-2], values.shape[-1]


def overlay(example: Example) -> Image.Image:
    """The heads' mean, or else the first method, over the picture at its own size, with the outline of its mask."""
    size = _grid(example.picture)
    if len(example.maps):
        return _tile(example, len(example.maps) - 1, size, scale_top(example.maps))
    return _method_tile(example, next(iter(example.methods.values())), size)


def head_figure(example: Example) -> Image.Image:
    """The picture, the heads' mean and every head as tiles that share one colour scale, then the other methods."""
    size = fitted(example.picture, TILE)
    tiles = _tiles(example, size)
    columns = math.ceil(len(tiles) / math.ceil(len(tiles) / 6))
    widest = math.ceil(max(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(name, font(14)) for name, _ in tiles))
    cell = (max(size[1], widest) + GAP, size[0] + 22 + GAP)
    rows = math.ceil(len(tiles) / columns)
    figure = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + 68), PAPER)
    draw = ImageDraw.Draw(figure)
    for place, (caption, tile) in enumerate(tiles):
        left, top = GAP + place % columns * cell[0], place // columns * cell[1] + 4
        draw.text((left, top), caption, INK, font=font(14))
        figure.paste(tile, (left, top + 20))
    if len(example.maps):
        _colour_bar(figure, scale_top(example.maps), (GAP, figure.height - 54))
    if example.methods:
        text = "other methods: each from its least to its largest value"
        draw.text((GAP + 360 if len(example.maps) else GAP, figure.height - 55), text, INK, font=font(13))
    _legend(draw, (GAP, figure.height - 22), with_truth=example.truth is not None)
    return figure


def contact_sheet(rows: list[tuple[str, Example]]) -> Image.Image:
    """One row of tiles per captioned example; within a row the heads share one colour scale.

    Args:
        rows: Caption and example; all have the same number of heads and the same methods.
    """
    side, left, header = 130, 150, 28
    columns = [_tiles(example, fitted(example.picture, side)) for _, example in rows]
    heights = [max(tiles[0][1].height, 60) + 6 for tiles in columns]
    sheet = Image.new("RGB", (left + len(columns[0]) * (side + 6) + GAP, header + sum(heights) + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (name, _) in enumerate(columns[0]):
        draw.text((left + place * (side + 6), 8), name.partition("  ")[0], INK, font=font(13))
    top = header
    for (caption, _), tiles, height in zip(rows, columns, heights, strict=True):
        lines = [shortened(line, left - 2 * GAP) for line in caption.splitlines()]
        draw.multiline_text((GAP, top), "\n".join(lines), INK, font=font(13))
        for place, (_, tile) in enumerate(tiles):
            sheet.paste(tile, (left + place * (side + 6) + (side - tile.width) // 2, top))
        top += height
    _legend(draw, (left, top), with_truth=rows[0][1].truth is not None)
    return sheet


def at_size(map_: Tensor, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A soft map (rows, columns) at another height and width, bilinear between patch centres."""
    image = Image.fromarray(map_.float().numpy())
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def heat_over(picture: Image.Image, heat: npt.NDArray[np.float32]) -> Image.Image:
    """An RGB picture in dim grey under the colours of a heat (height, width) in [0, 1] of its size."""
    levels = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    strength = 0.2 + 0.6 * levels
    colours = matplotlib.colormaps[COLOURS](levels[:, 0])[:, :3].astype(np.float32) * 255 * strength
    level = np.rint(heat * 255).astype(np.uint8)  # (height, width)
    grey = np.asarray(picture.convert("L"))[..., None] * (1 - strength)[level]
    return Image.fromarray((grey + colours[level] + 0.5).astype(np.uint8))


def _tiles(example: Example, size: tuple[int, int]) -> list[tuple[str, Image.Image]]:
    """Captioned tiles of (height, width): the picture, the mean, the heads, then the other methods."""
    heads = len(example.maps) - 1
    picture = as_image(example.picture, size)
    if example.truth is not None:
        _draw_outline(picture, to_pixels(example.truth, size), TRUTH)
    tiles = [("picture", picture)]
    for index in [heads, *range(heads)] if len(example.maps) else []:
        name = "mean" if index == heads else f"head {index}"
        score = f"  IoU {example.ious[index]:.2f}" if example.ious else ""
        tiles.append((name + score, _tile(example, index, size, scale_top(example.maps))))
    for name, found in example.methods.items():
        score = f"  IoU {example.method_ious[name]:.2f}" if example.method_ious else ""
        tiles.append((name + score, _method_tile(example, found, size)))
    return tiles


def _tile(example: Example, index: int, size: tuple[int, int], top: float) -> Image.Image:
    return draw_map(as_image(example.picture, size), example.maps[index], example.masks[index], top=top)


def draw_map(picture: Image.Image, map_: Tensor, mask: Tensor, *, top: float) -> Image.Image:
    """A picture in dim grey under a map's colours, with the outline of its mask.

    Args:
        picture: RGB.
        map_: (rows, columns) float, sums to 1.
        mask: (rows, columns) bool.
        top: Upper end of the colour scale, in multiples of uniform attention.
    """
    size = (picture.height, picture.width)
    times_uniform = at_size(map_, size) * map_.numel()
    tile = heat_over(picture, np.sqrt(np.clip(times_uniform / top, 0, 1)))
    _draw_outline(tile, to_pixels(mask, size), MASK)
    return tile


def _method_tile(example: Example, found: Segmentation, size: tuple[int, int]) -> Image.Image:
    """As `_tile`, coloured from the least to the largest value of a method's soft map; a mask of pixels is cut out."""
    if found.mask.shape == example.picture.shape[-2:]:
        colours = as_image(example.picture, size)
        inside = Image.fromarray(to_pixels(found.mask, size).numpy())
        tile = Image.composite(colours, colours.convert("L").point(lambda value: value // 4).convert("RGB"), inside)
        _draw_outline(tile, to_pixels(found.mask, size), MASK)
        return tile
    soft = at_size(found.soft, size)
    spread = max(float(np.ptp(soft)), np.finfo(np.float32).tiny)
    tile = heat_over(as_image(example.picture, size), (soft - soft.min()) / spread)
    _draw_outline(tile, to_pixels(found.mask, size), MASK)
    return tile


def scale_top(maps: Tensor) -> float:
    """Upper end of a picture's colour scale, in multiples of uniform attention: shared by its maps (n, r, c)."""
    values = maps.flatten()
    return max(LEAST_TOP, values.kthvalue(math.ceil(0.995 * len(values))).values.item() * maps[0].numel())


def _draw_outline(image: Image.Image, mask: Tensor, colour: tuple[int, int, int]) -> None:
    """Paint the mask's border pixels, on its inner side; thicker on large pictures."""
    whole = Image.fromarray(mask.numpy()).convert("L")
    thickness = max(1, round(max(image.size) / 300))
    inner = whole.filter(ImageFilter.BoxBlur(thickness)).point([0] * 255 + [255])  # quick at any thickness
    image.paste(colour, (0, 0), ImageChops.subtract(whole, inner))


def _colour_bar(figure: Image.Image, top: float, corner: tuple[int, int]) -> None:
    """The scale that all tiles share, with its two ends and its middle; the scale is one of square roots."""
    left, upper = corner
    width = 180
    ramp = matplotlib.colormaps[COLOURS](torch.linspace(0, 1, width).numpy(), bytes=True)[None, :, :3]
    figure.paste(Image.fromarray(ramp.repeat(12, axis=0)), (left, upper))
    draw = ImageDraw.Draw(figure)
    for place, text in ((0, "0"), (width // 2, f"{top / 4:.3g}"), (width, f"{top:.3g} times uniform attention")):
        draw.text((left + place, upper + 14), text, INK, font=font(13))


def _legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int], *, with_truth: bool) -> None:
    """What the outlines are."""
    left, upper = corner
    for colour, text in {MASK: "mask of the map", TRUTH: "given mask"}.items():
        if colour == MASK or with_truth:
            draw.rectangle((left, upper + 3, left + 10, upper + 13), outline=colour, width=2)
            draw.text((left + 16, upper), text, INK, font=font(13))
            left += 140
