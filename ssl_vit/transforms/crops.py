"""Random resized crops and flips of uint8 pictures: the geometric half of the views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ssl_vit.config import CropsConfig, ViewsConfig
from ssl_vit.transforms.randomness import Stream, fold, uniform, view_keys
from ssl_vit.transforms.separable import resampling_weights
from ssl_vit.transforms.transfer import sent

_ATTEMPTS = 10
_SHRINKS = 8, 4, 2  # by which a picture may be decoded smaller, see `data.decode`

Floats = npt.NDArray[np.float64]


class Draws(NamedTuple):
    """What is random in views (...), drawn before their pictures' sizes are known."""

    area: Floats  # (..., attempts), shares of the picture's
    ratio: Floats  # (..., attempts), width / height
    top: Floats  # (...), in [0, 1)
    left: Floats  # (...), in [0, 1)
    flip: npt.NDArray[np.bool_]  # (...)
    limits: Floats  # (..., 2), of width / height


class Boxes(NamedTuple):
    """What is cut out of a picture, in pixels, one box per key and in the keys' shape."""

    top: Tensor  # int64
    left: Tensor  # int64
    height: Tensor  # int64
    width: Tensor  # int64
    flip: Tensor  # bool


class Cut:
    """The views of one picture, which may be decoded smaller if the boxes allow; for one picture only.

    Args:
        draws: Of its views (V,).
        sizes: Of the views, in pixels.
    """

    def __init__(self, draws: Draws, sizes: Sequence[int]) -> None:
        self.draws = draws
        self.sizes = sizes
        self._whole: tuple[int, int] | None = None  # its height and width, if it is decoded smaller
        self._shrink = 1

    def shrink(self, height: int, width: int) -> int:
        """The largest of 1, 2, 4, 8 by which this picture may be shrunk and no box be smaller than its view.

        Args:
            height: Of the whole picture, in pixels.
            width: Of the whole picture, in pixels.
        """
        if min(height, width) >= _SHRINKS[-1] * max(self.sizes):
            boxes = boxes_in(self.draws, height, width)
            room = int((torch.minimum(boxes.height, boxes.width) // torch.tensor(self.sizes)).min())
            self._whole, self._shrink = (height, width), next((by for by in _SHRINKS if by <= room), 1)
        return self._shrink

    def into(self, picture: Tensor, views: Sequence[Tensor]) -> None:
        """Fill the views (C, S, S) from the picture (C, H, W), smaller by what `shrink` said if that was asked.

        In a smaller picture the boxes' edges lie on its own pixels, at most half of one beside the true place; a pixel
        of a view is never smaller than one of these.
        """
        boxes = boxes_in(self.draws, *(self._whole or picture.shape[1:]))
        if self._shrink > 1:
            boxes = _shrunk(boxes, self._shrink)
        for box, view in zip(_one_by_one(boxes), views, strict=True):
            _cut(picture, box, view)


class MultiCrop:
    """Global and local views of a picture; the same key gives the same boxes and flips in `one` and in `batch`."""

    def __init__(self, views: ViewsConfig) -> None:
        self.views = views
        kinds = views.global_crops, views.local_crops
        self.sizes = [crops.size for crops in kinds for _ in range(crops.count)]

    def draw(self, keys: Tensor) -> Draws:
        """What is random in the views (B, G + L) of samples (B,), the global ones first."""
        views = self.views
        kinds = (views.global_crops, 0), (views.local_crops, views.global_crops.count)
        drawn = [_draw(view_keys(keys, first, crops.count), crops=crops, flip=views.flip) for crops, first in kinds]
        return Draws(*(np.concatenate(parts, axis=1) for parts in zip(*drawn, strict=True)))

    def cut(self, draws: Draws, place: int) -> Cut:
        """The views of the picture at a place (of B) of draws."""
        return Cut(Draws(*(part[place] for part in draws)), self.sizes)

    def shapes(self, count: int, channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the global views (B, G, C, S, S) and the local views (B, L, C, s, s) of so many pictures."""
        big, small = self.views.global_crops, self.views.local_crops
        return (
            (count, big.count, channels, big.size, big.size),
            (count, small.count, channels, small.size, small.size),
        )

    def one(self, picture: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Views of one picture of any size.

        Args:
            picture: (C, H, W) uint8.
            key: The sample's key, () int64.

        Returns:
            Global views (G, C, S, S) and local views (L, C, s, s), uint8.
        """
        global_views, local_views = self.batch(picture[None], key[None])
        return global_views[0], local_views[0]

    def batch(self, pictures: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Views of pictures of one size, where these lie.

        Args:
            pictures: (B, C, H, W) uint8, on any device.
            keys: The samples' keys (B,) int64, on the CPU, which does not wait for the device.

        Returns:
            Global views (B, G, C, S, S) and local views (B, L, C, s, s), uint8, on the pictures' device. A GPU
            resamples in float, a CPU in fixed point: values may differ by one level.
        """
        count, channels, height, width = pictures.shape
        boxes = boxes_in(self.draw(keys), height, width)  # (B, V)
        shapes = self.shapes(count, channels)
        if pictures.device.type == "cpu":
            global_views, local_views = (torch.empty(shape, dtype=torch.uint8) for shape in shapes)
            box = _one_by_one(Boxes(*(part.flatten() for part in boxes)))
            for picture, *kinds in zip(pictures, global_views, local_views, strict=True):
                for view in (view for kind in kinds for view in kind):
                    _cut(picture, next(box), view)
            return global_views, local_views
        table = sent(torch.stack(boxes, dim=0), pictures.device)  # (5, B, V)
        parts = torch.split(table, [shape[1] for shape in shapes], dim=2)
        global_views, local_views = (
            cut_together(pictures, Boxes(*part), size=shape[-1]) for part, shape in zip(parts, shapes, strict=True)
        )
        return global_views, local_views


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
    return boxes_in(_draw(keys, crops=crops, flip=flip), height, width)


def boxes_in(draws: Draws, height: int, width: int) -> Boxes:
    """The boxes of views (...) in a picture of so many pixels."""
    area = height * width * draws.area  # (..., attempts)
    wide = np.rint(np.sqrt(area * draws.ratio))
    tall = np.rint(np.sqrt(area / draws.ratio))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.argmax(axis=-1, keepdims=True)
    found = fits.any(axis=-1)
    tall, wide = (np.take_along_axis(side, first, axis=-1)[..., 0] for side in (tall, wide))  # (...)
    top, left = draws.top * (height - tall + 1), draws.left * (width - wide + 1)
    if not found.all():
        narrow, broad = np.moveaxis(draws.limits, -1, 0)
        central_tall = np.where(width / height < narrow, np.maximum(1, np.rint(width / narrow)), height)
        central_wide = np.where(width / height > broad, np.maximum(1, np.rint(height * broad)), width)
        tall, wide = np.where(found, tall, central_tall), np.where(found, wide, central_wide)
        top = np.where(found, top, (height - central_tall) // 2)
        left = np.where(found, left, (width - central_wide) // 2)
    pixels = (np.asarray(part, dtype=np.int64) for part in (top, left, tall, wide))
    return Boxes(*map(torch.from_numpy, (*pixels, draws.flip)))


def cut_together(pictures: Tensor, boxes: Boxes, *, size: int) -> Tensor:
    """Views (B, V, C, S, S) uint8 of pictures (B, C, H, W) uint8 by matrix products, which a GPU likes best.

    Args:
        pictures: On the boxes' device.
        boxes: (B, V), of int64 all.
        size: S.
    """
    (batch, count), (channels, height, width) = boxes.top.shape, pictures.shape[1:]
    top, left, tall, wide, flip = (part.flatten() for part in boxes)
    rows = resampling_weights(top, tall, torch.zeros_like(flip, dtype=torch.bool), source=height, size=size)
    cols = resampling_weights(left, wide, flip.bool(), source=width, size=size)
    with torch.autocast(pictures.device.type, enabled=False):  # bfloat16 has fewer digits than a pixel
        across = pictures.float().flatten(1, 2) @ cols.view(batch, count * size, width).mT  # (B, C*H, V*S)
        across = across.clamp_(0, 255).view(batch, channels, height, count, size).permute(0, 3, 1, 2, 4)
        views = rows.view(batch, count, 1, size, height) @ across
    return views.round_().clamp_(0, 255).to(torch.uint8)


def _draw(keys: Tensor, *, crops: CropsConfig, flip: float) -> Draws:
    """What is random in views of one kind, in the keys' shape."""
    draws = uniform(fold(keys, Stream.CROP), 2 * _ATTEMPTS + 3).double()
    area_draw, ratio_draw, place_draw = torch.split(draws, [_ATTEMPTS, _ATTEMPTS, 3], dim=-1)
    top, left, flip_draw = place_draw.unbind(-1)
    (low, high), (narrow, broad) = crops.scale, crops.ratio
    area = low + (high - low) * area_draw
    ratio = torch.exp(math.log(narrow) + (math.log(broad) - math.log(narrow)) * ratio_draw)
    limits = np.broadcast_to(np.array(crops.ratio), (*keys.shape, 2))
    return Draws(area.numpy(), ratio.numpy(), top.numpy(), left.numpy(), (flip_draw < flip).numpy(), limits)


def _shrunk(boxes: Boxes, by: int) -> Boxes:
    """The boxes in a picture decoded smaller, their edges on its nearest pixels."""
    top, left, bottom, right = (
        (edge + by // 2) // by for edge in (boxes.top, boxes.left, boxes.top + boxes.height, boxes.left + boxes.width)
    )
    return Boxes(top, left, bottom - top, right - left, boxes.flip)


def _one_by_one(boxes: Boxes) -> zip[tuple[int, int, int, int, bool]]:
    """Boxes (N,) as Python's numbers."""
    return zip(*(part.tolist() for part in boxes), strict=True)


def _cut(picture: Tensor, box: tuple[int, int, int, int, bool], view: Tensor) -> None:
    """Fill a view (C, S, S) with a box of a picture (C, H, W), bicubic with antialias, as torchvision resizes it."""
    top, left, tall, wide, flip = box
    part = picture[None, :, top : top + tall, left : left + wide].contiguous(memory_format=torch.channels_last)
    resized = interpolate(part, size=view.shape[1:], mode="bicubic", antialias=True)[0]
    view.copy_(resized.flip(-1) if flip else resized)
