"""Attention drawn over the picture it belongs to, at the picture's size, and sheets of many."""

from __future__ import annotations

import math
from typing import NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from ssl_vit.attention.masks import mass_mask, to_pixels
from ssl_vit.attention.metrics import count_truth, iou
from ssl_vit.evaluation.tiles import INK, PAPER, as_image, fitted, font, shortened

TILE = 240  # pixels of a tile's longer side
GAP = 10
COLOURS = "inferno"
MASK, TRUTH = (70, 225, 255), (255, 60, 200)  # outlines: cyan stands out from all colours of the heat
LEAST_TOP = 6.0  # times uniform: a colour scale that ends lower would make noise look like attention


class Example(NamedTuple):
    """One picture with all that can be drawn of it. The heads come first, their mean last."""

    picture: Tensor  # (C, H, W) uint8
    maps: Tensor  # (heads + 1, rows, columns) float, each sums to 1
    masks: Tensor  # (heads + 1, rows, columns) bool
    truth: Tensor | None  # (H, W) bool: the given object mask
    ious: list[float] | None  # heads + 1, of the masks with the truth


def make_example(picture: Tensor, maps: Tensor, mass: float, truth: Tensor | None) -> Example:
    """What can be drawn of a picture (C, H, W) uint8 with maps (heads, rows, columns) and, if given, a mask (H, W)."""
    maps = torch.cat([maps, maps.mean(0, keepdim=True)])
    masks = mass_mask(maps, mass)
    if truth is None:
        return Example(picture, maps, masks, None, None)
    counted = count_truth(truth, (maps.shape[-2], maps.shape[-1]))
    return Example(picture, maps, masks, truth, iou(masks, counted).tolist())


def overlay(example: Example) -> Image.Image:
    """The heads' mean over the picture at its own size, with the outline of its mask."""
    size = (example.picture.shape[-2], example.picture.shape[-1])
    return _tile(example, len(example.maps) - 1, size, _scale_top(example.maps))


def head_figure(example: Example) -> Image.Image:
    """The picture, the heads' mean and every head as tiles that share one colour scale."""
    size = fitted(example.picture, TILE)
    tiles = _tiles(example, size)
    columns = math.ceil(len(tiles) / math.ceil(len(tiles) / 6))
    cell = (max(size[1], 130) + GAP, size[0] + 22 + GAP)
    rows = math.ceil(len(tiles) / columns)
    figure = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + 68), PAPER)
    draw = ImageDraw.Draw(figure)
    for place, (caption, tile) in enumerate(tiles):
        left, top = GAP + place % columns * cell[0], place // columns * cell[1] + 4
        draw.text((left, top), caption, INK, font=font(14))
        figure.paste(tile, (left, top + 20))
    _colour_bar(figure, _scale_top(example.maps), (GAP, figure.height - 54))
    _legend(draw, (GAP, figure.height - 22), with_truth=example.truth is not None)
    return figure


def contact_sheet(rows: list[tuple[str, Example]]) -> Image.Image:
    """One row of tiles per captioned example; within a row the heads share one colour scale.

    Args:
        rows: Caption and example; all have the same number of heads.
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


def heat_over(picture: Tensor, heat: npt.NDArray[np.float32]) -> Image.Image:
    """A picture (C, H, W) uint8 in dim grey under the colours of a heat (height, width) in [0, 1], at its size."""
    colours = matplotlib.colormaps[COLOURS](heat, bytes=True)[..., :3]
    grey = np.asarray(as_image(picture, (heat.shape[0], heat.shape[1])).convert("L"))[..., None]
    strength = 0.2 + 0.6 * heat[..., None]
    return Image.fromarray(np.rint(grey * (1 - strength) + colours * strength).astype(np.uint8))


def _tiles(example: Example, size: tuple[int, int]) -> list[tuple[str, Image.Image]]:
    """Captioned tiles of (height, width): the picture, the mean, then the heads."""
    top = _scale_top(example.maps)
    heads = len(example.maps) - 1
    picture = as_image(example.picture, size)
    if example.truth is not None:
        _draw_outline(picture, to_pixels(example.truth, size), TRUTH)
    tiles = [("picture", picture)]
    for index in [heads, *range(heads)]:
        name = "mean" if index == heads else f"head {index}"
        score = f"  IoU {example.ious[index]:.2f}" if example.ious else ""
        tiles.append((name + score, _tile(example, index, size, top)))
    return tiles


def _tile(example: Example, index: int, size: tuple[int, int], top: float) -> Image.Image:
    """The picture in dim grey under one map's colours, with the outline of its mask."""
    times_uniform = at_size(example.maps[index], size) * example.maps[index].numel()
    tile = heat_over(example.picture, np.sqrt(np.clip(times_uniform / top, 0, 1)))
    _draw_outline(tile, to_pixels(example.masks[index], size), MASK)
    return tile


def _scale_top(maps: Tensor) -> float:
    """Upper end of a picture's colour scale, in multiples of uniform attention: shared by all its heads."""
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
