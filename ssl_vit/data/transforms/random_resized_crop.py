"""Random crop boxes and flips of views as functions of their RNG keys."""

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
    """The random parameters of views (...), sampled before the sizes of their images are known."""

    area: Floats  # (..., attempts), fractions of the image's area
    ratio: Floats  # (..., attempts), width / height
    top: Floats  # (...), in [0, 1)
    left: Floats  # (...), in [0, 1)
    flip: npt.NDArray[np.bool_]  # (...)
    limits: Floats  # (..., 2), of width / height


class Boxes(NamedTuple):
    """Crop boxes in pixels and horizontal flips, one per key and in the keys' shape."""

    top: Tensor  # int64
    left: Tensor  # int64
    height: Tensor  # int64
    width: Tensor  # int64
    flip: Tensor  # bool


def sample_crop_boxes(keys: Tensor, height: int, width: int, *, crops: CropsConfig, flip: float) -> Boxes:
    """Sample one box and flip per key, distributed like torchvision's RandomResizedCrop and RandomHorizontalFlip.

    The area is uniform in crops.scale times the image's, log(width / height) uniform in log(crops.ratio), the position
    uniform. If ten attempts do not fit into the image: the largest central box of an allowed ratio.

    Args:
        keys: One key per view, any shape, int64.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        crops: Ranges of the area fraction and of width / height.
        flip: Probability of a flip.
    """
    return resolve_boxes(sample_crop_params(keys, crops=crops, flip=flip), height, width)


def sample_crop_params(keys: Tensor, *, crops: CropsConfig, flip: float) -> CropParams:
    """Sample the parameters of views of one kind, in the keys' shape."""
    draws = uniform(fold_in(keys, RNGStream.CROP), 2 * _ATTEMPTS + 3).double()
    area_draws, ratio_draws, other_draws = torch.split(draws, [_ATTEMPTS, _ATTEMPTS, 3], dim=-1)
    top, left, flip_draw = other_draws.unbind(-1)
    (low, high), (narrow, wide) = crops.scale, crops.ratio
    area = low + (high - low) * area_draws
    ratio = torch.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * ratio_draws)
    limits = np.broadcast_to(np.array(crops.ratio), (*keys.shape, 2))
    return CropParams(area.numpy(), ratio.numpy(), top.numpy(), left.numpy(), (flip_draw < flip).numpy(), limits)


def resolve_boxes(params: CropParams, height: int, width: int) -> Boxes:
    """Compute the boxes of views (...) in an image of this height and width in pixels."""
    area = height * width * params.area  # (..., attempts)
    widths = np.rint(np.sqrt(area * params.ratio))
    heights = np.rint(np.sqrt(area / params.ratio))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=-1, keepdims=True)
    any_fits = fits.any(axis=-1)
    box_height, box_width = (np.take_along_axis(side, first, axis=-1)[..., 0] for side in (heights, widths))  # (...)
    top, left = params.top * (height - box_height + 1), params.left * (width - box_width + 1)
    if not any_fits.all():
        narrowest, widest = np.moveaxis(params.limits, -1, 0)
        central_height = np.where(width / height < narrowest, np.maximum(1, np.rint(width / narrowest)), height)
        central_width = np.where(width / height > widest, np.maximum(1, np.rint(height * widest)), width)
        box_height = np.where(any_fits, box_height, central_height)
        box_width = np.where(any_fits, box_width, central_width)
        top = np.where(any_fits, top, (height - central_height) // 2)
        left = np.where(any_fits, left, (width - central_width) // 2)
    pixels = (np.asarray(part, dtype=np.int64) for part in (top, left, box_height, box_width))
    return Boxes(*map(torch.from_numpy, (*pixels, params.flip)))


def scale_boxes(boxes: Boxes, factor: int) -> Boxes:
    """Return the boxes in an image decoded smaller by `factor`, their edges rounded to its pixels."""
    edges = boxes.top, boxes.left, boxes.top + boxes.height, boxes.left + boxes.width
    top, left, bottom, right = ((edge + factor // 2) // factor for edge in edges)
    return Boxes(top, left, bottom - top, right - left, boxes.flip)
