"""Attention drawn over the image it belongs to, at the image's size, and sheets of many."""

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

from ssl_vit.evaluation.segmentation.iou import iou, pool_mask_to_patches
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.models.attention_maps import attention_mass_mask, upsample_mask
from ssl_vit.visualization.image_grid import INK, PAPER, as_image, fitted, font, shortened

TILE = 240  # pixels of a tile's longer side
GAP = 10
COLORS = "inferno"
MASK, TRUTH = (70, 225, 255), (255, 60, 200)  # outlines: cyan stands out from all colors of the heat
LEAST_TOP = 6.0  # times uniform: a color scale that ends lower would make noise look like attention


class OverlayInputs(NamedTuple):
    """One image with all that can be drawn of it. The heads come first, their mean last; no map without attention."""

    image: Tensor  # (C, H, W) uint8
    maps: Tensor  # (heads + 1, rows, columns) float, each sums to 1
    masks: Tensor  # (heads + 1, rows, columns) bool
    truth: Tensor | None  # (H, W) bool: the given object mask
    ious: list[float] | None  # heads + 1, of the masks with the truth
    methods: Mapping[str, Segmentation]  # what others than attention find: of patches, or of pixels
    method_ious: Mapping[str, float]


def make_example(
    image: Tensor,
    maps: Tensor | None,
    mass: float,
    truth: Tensor | None,
    *,
    counted: Tensor | None = None,
    methods: Mapping[str, Segmentation] | None = None,
) -> OverlayInputs:
    """What can be drawn of an image (C, H, W) uint8.

    Args:
        image: Of any size.
        maps: (heads, rows, columns); None: attention is not drawn.
        mass: Share of the attention that a mask holds.
        truth: The given object (H, W) bool, if any.
        counted: (H, W) bool, False where a pixel is void.
        methods: What other methods find, at least one where there are no maps.
    """
    maps = torch.zeros(0, 1, 1) if maps is None else torch.cat([maps, maps.mean(0, keepdim=True)])
    masks, methods = attention_mass_mask(maps, mass), methods or {}
    if truth is None:
        return OverlayInputs(image, maps, masks, None, None, methods, {})
    truths = {grid: pool_mask_to_patches(truth, grid, counted) for grid in {_grid(maps), *map(_grid, _softs(methods))}}
    of_methods = {name: iou(found.mask, truths[_grid(found.mask)]).item() for name, found in methods.items()}
    return OverlayInputs(image, maps, masks, truth, iou(masks, truths[_grid(maps)]).tolist(), methods, of_methods)


def _softs(methods: Mapping[str, Segmentation]) -> list[Tensor]:
    return [found.soft for found in methods.values()]


def _grid(values: Tensor) -> tuple[int, int]:
    return values.shape[-2], values.shape[-1]


def overlay(example: OverlayInputs) -> Image.Image:
    """The heads' mean, or else the first method, over the image at its own size, with the outline of its mask."""
    size = _grid(example.image)
    if len(example.maps):
        return _tile(example, len(example.maps) - 1, size, color_scale_max(example.maps))
    return _method_tile(example, next(iter(example.methods.values())), size)


def head_figure(example: OverlayInputs) -> Image.Image:
    """The image, the heads' mean and every head as tiles that share one color scale, then the other methods."""
    size = fitted(example.image, TILE)
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
        _color_bar(figure, color_scale_max(example.maps), (GAP, figure.height - 54))
    if example.methods:
        text = "other methods: each from its least to its largest value"
        draw.text((GAP + 360 if len(example.maps) else GAP, figure.height - 55), text, INK, font=font(13))
    _legend(draw, (GAP, figure.height - 22), with_truth=example.truth is not None)
    return figure


def image_grid(rows: list[tuple[str, OverlayInputs]]) -> Image.Image:
    """One row of tiles per captioned example; within a row the heads share one color scale.

    Args:
        rows: Caption and example; all have the same number of heads and the same methods.
    """
    side, left, header = 130, 150, 28
    columns = [_tiles(example, fitted(example.image, side)) for _, example in rows]
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
    """A soft map (rows, columns) at another height and width, bilinear between patch centers."""
    image = Image.fromarray(map_.float().numpy())
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def blend_heatmap(image: Image.Image, heat: npt.NDArray[np.float32]) -> Image.Image:
    """An RGB image in dim gray under the colors of a heat (height, width) in [0, 1] of its size."""
    levels = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    strength = 0.2 + 0.6 * levels
    colors = matplotlib.colormaps[COLORS](levels[:, 0])[:, :3].astype(np.float32) * 255 * strength
    level = np.rint(heat * 255).astype(np.uint8)  # (height, width)
    gray = np.asarray(image.convert("L"))[..., None] * (1 - strength)[level]
    return Image.fromarray((gray + colors[level] + 0.5).astype(np.uint8))


def _tiles(example: OverlayInputs, size: tuple[int, int]) -> list[tuple[str, Image.Image]]:
    """Captioned tiles of (height, width): the image, the mean, the heads, then the other methods."""
    heads = len(example.maps) - 1
    image = as_image(example.image, size)
    if example.truth is not None:
        _draw_outline(image, upsample_mask(example.truth, size), TRUTH)
    tiles = [("image", image)]
    for index in [heads, *range(heads)] if len(example.maps) else []:
        name = "mean" if index == heads else f"head {index}"
        score = f"  IoU {example.ious[index]:.2f}" if example.ious else ""
        tiles.append((name + score, _tile(example, index, size, color_scale_max(example.maps))))
    for name, found in example.methods.items():
        score = f"  IoU {example.method_ious[name]:.2f}" if example.method_ious else ""
        tiles.append((name + score, _method_tile(example, found, size)))
    return tiles


def _tile(example: OverlayInputs, index: int, size: tuple[int, int], top: float) -> Image.Image:
    return draw_map(as_image(example.image, size), example.maps[index], example.masks[index], top=top)


def draw_map(image: Image.Image, map_: Tensor, mask: Tensor, *, top: float) -> Image.Image:
    """An image in dim gray under a map's colors, with the outline of its mask.

    Args:
        image: RGB.
        map_: (rows, columns) float, sums to 1.
        mask: (rows, columns) bool.
        top: Upper end of the color scale, in multiples of uniform attention.
    """
    size = (image.height, image.width)
    times_uniform = at_size(map_, size) * map_.numel()
    tile = blend_heatmap(image, np.sqrt(np.clip(times_uniform / top, 0, 1)))
    _draw_outline(tile, upsample_mask(mask, size), MASK)
    return tile


def _method_tile(example: OverlayInputs, found: Segmentation, size: tuple[int, int]) -> Image.Image:
    """As `_tile`, colored from the least to the largest value of a method's soft map; a mask of pixels is cut out."""
    if found.mask.shape == example.image.shape[-2:]:
        colors = as_image(example.image, size)
        inside = Image.fromarray(upsample_mask(found.mask, size).numpy())
        tile = Image.composite(colors, colors.convert("L").point(lambda value: value // 4).convert("RGB"), inside)
        _draw_outline(tile, upsample_mask(found.mask, size), MASK)
        return tile
    soft = at_size(found.soft, size)
    spread = max(float(np.ptp(soft)), np.finfo(np.float32).tiny)
    tile = blend_heatmap(as_image(example.image, size), (soft - soft.min()) / spread)
    _draw_outline(tile, upsample_mask(found.mask, size), MASK)
    return tile


def color_scale_max(maps: Tensor) -> float:
    """Upper end of an image's color scale, in multiples of uniform attention: shared by its maps (n, r, c)."""
    values = maps.flatten()
    return max(LEAST_TOP, values.kthvalue(math.ceil(0.995 * len(values))).values.item() * maps[0].numel())


def _draw_outline(image: Image.Image, mask: Tensor, color: tuple[int, int, int]) -> None:
    """Paint the mask's border pixels, on its inner side; thicker on large images."""
    whole = Image.fromarray(mask.numpy()).convert("L")
    thickness = max(1, round(max(image.size) / 300))
    inner = whole.filter(ImageFilter.BoxBlur(thickness)).point([0] * 255 + [255])  # quick at any thickness
    image.paste(color, (0, 0), ImageChops.subtract(whole, inner))


def _color_bar(figure: Image.Image, top: float, corner: tuple[int, int]) -> None:
    """The scale that all tiles share, with its two ends and its middle; the scale is one of square roots."""
    left, upper = corner
    width = 180
    ramp = matplotlib.colormaps[COLORS](torch.linspace(0, 1, width).numpy(), bytes=True)[None, :, :3]
    figure.paste(Image.fromarray(ramp.repeat(12, axis=0)), (left, upper))
    draw = ImageDraw.Draw(figure)
    for place, text in ((0, "0"), (width // 2, f"{top / 4:.3g}"), (width, f"{top:.3g} times uniform attention")):
        draw.text((left + place, upper + 14), text, INK, font=font(13))


def _legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int], *, with_truth: bool) -> None:
    """What the outlines are."""
    left, upper = corner
    for color, text in {MASK: "mask of the map", TRUTH: "given mask"}.items():
        if color == MASK or with_truth:
            draw.rectangle((left, upper + 3, left + 10, upper + 13), outline=color, width=2)
            draw.text((left + 16, upper), text, INK, font=font(13))
            left += 140
