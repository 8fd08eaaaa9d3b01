"""Where views are cut out of their images: random boxes and flips, as a function of the views' keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_vit.config.methods import CropsConfig
from ssl_vit.runtime.rng import RNGStream, fold_in, uniform

_ATTEMPTS = 10

Floats = npt.NDArray[np.float64]


class CropParams(NamedTuple):
    """What is random in views (...), drawn before their images' sizes are known."""

    area: Floats  # (..., attempts), shares of the image's
    ratio: Floats  # (..., attempts), width / height
    top: Floats  # (...), in [0, 1)
    left: Floats  # (...), in [0, 1)
    flip: npt.NDArray[np.bool_]  # (...)
    limits: Floats  # (..., 2), of width / height


class Boxes(NamedTuple):
    """What is cut out of an image, in pixels, one box per key and in the keys' shape."""

    top: Tensor  # int64
    left: Tensor  # int64
    height: Tensor  # int64
    width: Tensor  # int64
    flip: Tensor  # bool


def sample_crop_boxes(keys: Tensor, height: int, width: int, *, crops: CropsConfig, flip: float) -> Boxes:
    """One random box and flip per key, distributed as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Area uniform in crops.scale times the image's, log(width / height) uniform in log(crops.ratio), place uniform.
    When ten attempts do not fit into the image: the largest central box of an allowed ratio.

    Args:
        keys: One key per view, any shape, int64.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        crops: Range of the share of area, and range of width / height.
        flip: Probability.
    """
    return resolve_boxes(sample_crop_params(keys, crops=crops, flip=flip), height, width)


def sample_crop_params(keys: Tensor, *, crops: CropsConfig, flip: float) -> CropParams:
    """What is random in views of one kind, in the keys' shape."""
    draws = uniform(fold_in(keys, RNGStream.CROP), 2 * _ATTEMPTS + 3).double()
    area_draw, ratio_draw, place_draw = torch.split(draws, [_ATTEMPTS, _ATTEMPTS, 3], dim=-1)
    top, left, flip_draw = place_draw.unbind(-1)
    (low, high), (narrow, broad) = crops.scale, crops.ratio
    area = low + (high - low) * area_draw
    ratio = torch.exp(math.log(narrow) + (math.log(broad) - math.log(narrow)) * ratio_draw)
    limits = np.broadcast_to(np.array(crops.ratio), (*keys.shape, 2))
    return CropParams(area.numpy(), ratio.numpy(), top.numpy(), left.numpy(), (flip_draw < flip).numpy(), limits)


def resolve_boxes(draws: CropParams, height: int, width: int) -> Boxes:
    """The boxes of views (...) in an image of so many pixels."""
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


def scale_boxes(boxes: Boxes, by: int) -> Boxes:
    """The boxes in an image decoded smaller, their edges on its nearest pixels."""
    top, left, bottom, right = (
        (edge + by // 2) // by for edge in (boxes.top, boxes.left, boxes.top + boxes.height, boxes.left + boxes.width)
    )
    return Boxes(top, left, bottom - top, right - left, boxes.flip)
