"""Random crop boxes and flips as functions of their RNG keys, and batched crops: one matrix product per axis."""

from __future__ import annotations

import math
from functools import cache
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


def sample_crop_params(keys: Tensor, *, crops: CropsConfig, flip: float) -> CropParams:
    """Sample boxes and flips for keys of any shape, as torchvision's RandomResizedCrop and RandomHorizontalFlip do.

    The area is uniform in crops.scale times the image's, log(width / height) uniform in log(crops.ratio), the position
    uniform. If ten attempts do not fit into the image: the largest central box of an allowed ratio. `flip` is the
    probability of a flip.
    """
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


def batched_resized_crop(images: Tensor, boxes: Boxes, *, size: int, cache_weights: bool) -> Tensor:
    """Crop views (B, V, C, size, size) uint8 from images (B, C, H, W) uint8, resampled in float.

    The boxes (B, V) are on the images' device, their flips may be 0 and 1. `cache_weights` keeps the weights of all
    boxes possible in an image of this size: for small ones only.
    """
    weights = cached_bicubic_weights if cache_weights else bicubic_weights
    (batch, count), (channels, height, width) = boxes.top.shape, images.shape[1:]
    top, left, box_height, box_width, flip = (part.flatten() for part in boxes)
    rows = weights(top, box_height, torch.zeros_like(flip).bool(), source=height, size=size)
    columns = weights(left, box_width, flip.bool(), source=width, size=size)
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 has fewer digits than a pixel
        resized = images.float().flatten(1, 2) @ columns.view(batch, count * size, width).mT  # (B, C*H, V*S)
        # Clamped between the axes, as 8-bit resizers do.
        resized = resized.clamp_(0, 255).view(batch, channels, height, count, size).permute(0, 3, 1, 2, 4)
        views = rows.view(batch, count, 1, size, height) @ resized
    return views.round_().clamp_(0, 255).to(torch.uint8)


def bicubic_weights(start: Tensor, length: Tensor, flip: Tensor, *, source: int, size: int) -> Tensor:
    """Compute weights (B, size, source) of bicubic, antialiased resampling from `source` to `size` pixels of an axis.

    Only an interval of each image's axis is read, of `length` (B,) pixels from `start` (B,) on; `flip` (B,) bool
    reverses the output. Keys' cubic convolution with a = -1/2, widened for downscaling, cut off at the ends of the
    interval and normalized: what Pillow and torchvision do to a crop.
    """
    start, length, flip = (each[:, None, None] for each in (start, length, flip))  # (B, 1, 1)
    step = length / size
    out = torch.arange(size, device=start.device)[:, None]  # (size, 1)
    center = start + (torch.where(flip, size - 1 - out, out) + 0.5) * step  # (B, size, 1)
    pixel = torch.arange(source, device=start.device)  # (source,)
    weight = _cubic((pixel + 0.5 - center) / step.clamp(min=1))  # (B, size, source)
    weight *= (pixel >= start) & (pixel < start + length)
    return weight.div_(weight.sum(dim=-1, keepdim=True))


def cached_bicubic_weights(start: Tensor, length: Tensor, flip: Tensor, *, source: int, size: int) -> Tensor:
    """Look up `bicubic_weights` in a table: much faster on a CPU; 22 MB for 48 to 48 pixels."""
    row = start * (2 * source - start + 1) // 2 + length - 1  # intervals are sorted by start, then by length
    return _all_weights(source, size)[2 * row + flip]


@cache
def _all_weights(source: int, size: int) -> Tensor:
    """Compute the weights (2 * intervals, size, source) of every interval of an axis, forwards and flipped."""
    start, last = torch.triu_indices(source, source).repeat_interleave(2, dim=1)
    flip = torch.arange(len(start)) % 2 == 1
    return bicubic_weights(start, last - start + 1, flip, source=source, size=size)


def _cubic(x: Tensor) -> Tensor:
    """Evaluate Keys' cubic convolution kernel (1981), a = -1/2: 1 at 0, 0 at 1, and 0 from 2 on."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
