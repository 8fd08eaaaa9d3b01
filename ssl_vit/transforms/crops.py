"""Random resized crops and flips of uint8 pictures: the geometric half of the views."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ssl_vit.config import CropsConfig, ViewsConfig
from ssl_vit.transforms.randomness import Stream, fold, uniform, view_keys
from ssl_vit.transforms.separable import apply, resampling_weights

_ATTEMPTS = 10


class Boxes(NamedTuple):
    """What is cut out of a picture, in pixels, one box per key and in the keys' shape."""

    top: Tensor  # int64
    left: Tensor  # int64
    height: Tensor  # int64
    width: Tensor  # int64
    flip: Tensor  # bool


class MultiCrop:
    """Global and local views of a picture; the same key gives the same boxes and flips in `one` and in `batch`."""

    def __init__(self, views: ViewsConfig) -> None:
        self.views = views

    def one(self, picture: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Views of one picture of any size.

        Args:
            picture: (C, H, W) uint8.
            key: The sample's key, () int64.

        Returns:
            Global views (G, C, S, S) and local views (L, C, s, s), uint8.
        """
        kinds = self.views.global_crops, self.views.local_crops
        first_view = 0, kinds[0].count
        global_views, local_views = (
            self._one(picture, view_keys(key, first, crops.count), crops)
            for crops, first in zip(kinds, first_view, strict=True)
        )
        return global_views, local_views

    def batch(self, pictures: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Views of pictures of one size, together; for small pictures far faster than one by one.

        Args:
            pictures: (B, C, H, W) uint8.
            keys: The samples' keys (B,) int64.

        Returns:
            Global views (B, G, C, S, S) and local views (B, L, C, s, s), uint8.
        """
        kinds = self.views.global_crops, self.views.local_crops
        first_view = 0, kinds[0].count
        x = pictures.float()
        global_views, local_views = (
            self._batch(x, view_keys(keys, first, crops.count), crops)
            for crops, first in zip(kinds, first_view, strict=True)
        )
        return global_views, local_views

    def _one(self, picture: Tensor, keys: Tensor, crops: CropsConfig) -> Tensor:
        """Views (V, C, S, S) of one picture, for keys (V,)."""
        channels, height, width = picture.shape
        boxes = draw_boxes(keys, height, width, crops=crops, flip=self.views.flip)
        views = picture.new_empty(len(keys), channels, crops.size, crops.size)
        for i, (*box, flip) in enumerate(zip(*(part.tolist() for part in boxes), strict=True)):
            view = tv.resized_crop(picture, *box, [crops.size, crops.size], InterpolationMode.BICUBIC, antialias=True)
            views[i] = tv.horizontal_flip(view) if flip else view
        return views

    def _batch(self, x: Tensor, keys: Tensor, crops: CropsConfig) -> Tensor:
        """Views (B, V, C, S, S) uint8 of pictures (B, C, H, W) float, for keys (B, V)."""
        (batch, count), (channels, height, width), size = keys.shape, x.shape[1:], crops.size
        boxes = draw_boxes(keys.flatten(), height, width, crops=crops, flip=self.views.flip)
        top, left, tall, wide, flip = (part.to(x.device, non_blocking=True) for part in boxes)  # (B*V,)
        rows = resampling_weights(top, tall, torch.zeros_like(flip), source=height, size=size)
        cols = resampling_weights(left, wide, flip, source=width, size=size)
        views = apply(x.repeat_interleave(count, dim=0), rows, cols, between=(0, 255))
        return views.round_().clamp_(0, 255).to(torch.uint8).view(batch, count, channels, size, size)


def draw_boxes(keys: Tensor, height: int, width: int, *, crops: CropsConfig, flip: float) -> Boxes:
    """One random box and flip per key, distributed as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Area uniform in crops.scale times the picture's, log(width / height) uniform in log(crops.ratio), place uniform.
    When ten attempts do not fit into the picture: the largest central box of an allowed ratio.

    Args:
        keys: One key per view, any shape, int64.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        crops: Range of the share of area, and range of width / height.
        flip: Probability.
    """
    draws = uniform(fold(keys, Stream.CROP), 2 * _ATTEMPTS + 3).double()
    area_draw, ratio_draw, place_draw = torch.split(
        draws, [_ATTEMPTS, _ATTEMPTS, 3], dim=-1
    )  # (..., attempts), (..., 3)
    top_draw, left_draw, flip_draw = place_draw.unbind(-1)
    (low, high), (narrow, broad) = crops.scale, crops.ratio
    area = height * width * (low + (high - low) * area_draw)  # (..., attempts)
    ratio = torch.exp(math.log(narrow) + (math.log(broad) - math.log(narrow)) * ratio_draw)
    wide = torch.sqrt(area * ratio).round()
    tall = torch.sqrt(area / ratio).round()
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.int().argmax(dim=-1, keepdim=True)
    found = fits.any(dim=-1)

    central_tall, central_wide = _central_box(height, width, crops.ratio)
    tall = torch.where(found, tall.gather(-1, first).squeeze(-1), central_tall)
    wide = torch.where(found, wide.gather(-1, first).squeeze(-1), central_wide)
    top = torch.where(found, top_draw * (height - tall + 1), (height - central_tall) // 2)
    left = torch.where(found, left_draw * (width - wide + 1), (width - central_wide) // 2)
    return Boxes(top.long(), left.long(), tall.long(), wide.long(), flip_draw < flip)


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box whose width / height lies within `ratio`, at least one pixel each."""
    narrow, broad = ratio
    if width / height < narrow:
        return max(1, round(width / narrow)), width
    if width / height > broad:
        return height, max(1, round(height * broad))
    return height, width
