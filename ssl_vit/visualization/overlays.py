"""Attention maps and masks drawn over their image, alone or in grids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.evaluation.segmentation.iou import iou, pool_mask_to_patches
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.models.attention_maps import attention_mass_mask, upsample_mask
from ssl_vit.visualization.image_grid import (
    COLOR_MAP,
    captioned,
    color_bar,
    draw_outline,
    fit_size,
    image_grid,
    legend,
    page,
    stack,
    text_image,
    to_pil,
)

HEAD_TILE, GRID_TILE = 240, 130  # pixels of a tile's longer side
MASK, TARGET = (70, 225, 255), (255, 60, 200)  # outlines: cyan differs from all colors of the color map
MIN_SCALE_MAX = 6.0  # times uniform attention: a shorter color scale would make noise look like attention


class OverlayInputs(NamedTuple):
    """One image with all that is drawn over it; the heads come first, then their mean; no maps without attention."""

    image: Tensor  # (C, H, W) uint8
    maps: Tensor  # (heads + 1, rows, columns) float, each sums to 1
    masks: Tensor  # (heads + 1, rows, columns) bool
    target: Tensor | None  # (H, W) bool: the ground truth mask
    ious: list[float] | None  # heads + 1, of the masks with the target
    methods: Mapping[str, Segmentation]  # of other methods than attention, at patch or pixel resolution
    method_ious: Mapping[str, float]


def make_overlay_inputs(
    image: Tensor,
    maps: Tensor | None,
    attention_mass: float,
    target: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    methods: Mapping[str, Segmentation] | None = None,
) -> OverlayInputs:
    """Compute masks, with a share of the attention, and IoUs of the attention maps of an image (C, H, W) uint8.

    Without maps (heads, rows, columns) there is at least one other method. The target is the ground truth (H, W) bool,
    if any; `valid` (H, W) is False where a pixel is void.
    """
    maps = torch.zeros(0, 1, 1) if maps is None else torch.cat([maps, maps.mean(0, keepdim=True)])
    masks, methods = attention_mass_mask(maps, attention_mass), methods or {}
    if target is None:
        return OverlayInputs(image, maps, masks, None, None, methods, {})
    grids = {_size(maps), *(_size(found.mask) for found in methods.values())}
    targets = {grid: pool_mask_to_patches(target, grid, valid) for grid in grids}
    method_ious = {name: iou(found.mask, targets[_size(found.mask)]).item() for name, found in methods.items()}
    return OverlayInputs(image, maps, masks, target, iou(masks, targets[_size(maps)]).tolist(), methods, method_ious)


def overlay(inputs: OverlayInputs) -> Image.Image:
    """Draw the mean of the heads, or else the first method, over the image at its own size, with its mask's outline."""
    size = _size(inputs.image)
    if len(inputs.maps):
        return _head_tile(inputs, len(inputs.maps) - 1, size)
    return _method_tile(inputs, next(iter(inputs.methods.values())), size)


def head_figure(inputs: OverlayInputs) -> Image.Image:
    """Draw the image, the mean and every head with one color scale, then the other methods, as captioned tiles."""
    tiles = [captioned(tile, [name], size=14) for name, tile in _tiles(inputs, HEAD_TILE)]
    columns = math.ceil(len(tiles) / math.ceil(len(tiles) / 6))
    scales = []
    if len(inputs.maps):
        top = color_scale_max(inputs.maps)
        scales.append(color_bar({0: "0", 0.5: f"{top / 4:.3g}", 1: f"{top:.3g} times uniform attention"}))
    if inputs.methods:
        scales.append(text_image(["other methods: scaled from their smallest to their largest value"]))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return page([image_grid(rows, gap=10), stack(scales, horizontal=True, gap=24), _legend(inputs)])


def overlay_grid(rows: list[tuple[str, OverlayInputs]]) -> Image.Image:
    """Draw one row of tiles per captioned image, all with the same heads and methods; one color scale per image."""
    names = ["", *(name.partition("  ")[0] for name, _ in _tiles(rows[0][1], GRID_TILE))]
    grid = [
        [text_image(caption.splitlines(), max_width=GRID_TILE), *(tile for _, tile in _tiles(inputs, GRID_TILE))]
        for caption, inputs in rows
    ]
    return page([image_grid(grid, column_titles=names), _legend(rows[0][1])])


def draw_map(image: Image.Image, map_: Tensor, mask: Tensor, *, top: float) -> Image.Image:
    """Draw an attention map (rows, columns) of sum 1 over a gray version of an RGB image, and its mask's outline.

    `top` is the upper end of the color scale, in multiples of uniform attention.
    """
    size = (image.height, image.width)
    times_uniform = resize_map(map_, size) * map_.numel()
    tile = blend_heatmap(image, np.sqrt(np.clip(times_uniform / top, 0, 1)))
    draw_outline(tile, upsample_mask(mask, size), MASK)
    return tile


def color_scale_max(maps: Tensor) -> float:
    """Return the upper end of the color scale that the maps (n, rows, columns) of an image share.

    It is their 99.5 % quantile in multiples of uniform attention, at least `MIN_SCALE_MAX`.
    """
    values = maps.flatten()
    return max(MIN_SCALE_MAX, values.kthvalue(math.ceil(0.995 * len(values))).values.item() * maps[0].numel())


def resize_map(map_: Tensor, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Resize a map (rows, columns) to this height and width, bilinear between patch centers."""
    image = Image.fromarray(map_.float().numpy())
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def blend_heatmap(image: Image.Image, heat: npt.NDArray[np.float32]) -> Image.Image:
    """Blend the colors of a heat map (height, width) in [0, 1] over a dimmed gray version of an RGB image."""
    levels = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    opacity = 0.2 + 0.6 * levels
    colors = matplotlib.colormaps[COLOR_MAP](levels[:, 0])[:, :3].astype(np.float32) * 255 * opacity
    level = np.rint(heat * 255).astype(np.uint8)  # (height, width)
    gray = np.asarray(image.convert("L"))[..., None] * (1 - opacity)[level]
    return Image.fromarray((gray + colors[level] + 0.5).astype(np.uint8))


def _tiles(inputs: OverlayInputs, side: int) -> list[tuple[str, Image.Image]]:
    """Draw captioned tiles with this longer side: image, mean, heads, other methods."""
    heads, size = len(inputs.maps) - 1, fit_size(inputs.image, side)
    image = to_pil(inputs.image, size)
    if inputs.target is not None:
        draw_outline(image, upsample_mask(inputs.target, size), TARGET)
    tiles = [("image", image)]
    for head in [heads, *range(heads)] if len(inputs.maps) else []:
        score = f"  IoU {inputs.ious[head]:.2f}" if inputs.ious else ""
        tiles.append((("mean" if head == heads else f"head {head}") + score, _head_tile(inputs, head, size)))
    for name, found in inputs.methods.items():
        score = f"  IoU {inputs.method_ious[name]:.2f}" if inputs.method_ious else ""
        tiles.append((name + score, _method_tile(inputs, found, size)))
    return tiles


def _head_tile(inputs: OverlayInputs, head: int, size: tuple[int, int]) -> Image.Image:
    image = to_pil(inputs.image, size)
    return draw_map(image, inputs.maps[head], inputs.masks[head], top=color_scale_max(inputs.maps))


def _method_tile(inputs: OverlayInputs, found: Segmentation, size: tuple[int, int]) -> Image.Image:
    """Draw a score map from its smallest to its largest value, or darken the image outside of a mask of pixels."""
    image = to_pil(inputs.image, size)
    mask = upsample_mask(found.mask, size)
    if found.mask.shape == inputs.image.shape[-2:]:
        dark = image.convert("L").point(lambda value: value // 4).convert("RGB")
        tile = Image.composite(image, dark, Image.fromarray(mask.numpy()))
    else:
        scores = resize_map(found.score_map, size)
        value_range = max(float(np.ptp(scores)), np.finfo(np.float32).tiny)
        tile = blend_heatmap(image, (scores - scores.min()) / value_range)
    draw_outline(tile, mask, MASK)
    return tile


def _legend(inputs: OverlayInputs) -> Image.Image:
    return legend({"mask of the map": MASK} | ({"ground truth": TARGET} if inputs.target is not None else {}))


def _size(values: Tensor) -> tuple[int, int]:
    return values.shape[-2], values.shape[-1]
