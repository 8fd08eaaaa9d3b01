"""Crop and resize batches of images of one size: bicubic, as one matrix product per axis, each image its own crop."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ssl_vit.data.transforms.random_resized_crop import Boxes


class WeightsFn(Protocol):
    """The signature of `bicubic_weights`."""

    def __call__(self, start: Tensor, length: Tensor, flip: Tensor, *, source: int, size: int) -> Tensor: ...


def batched_resized_crop(images: Tensor, boxes: Boxes, *, size: int, weights: WeightsFn) -> Tensor:
    """Crop views (B, V, C, S, S) uint8 from images (B, C, H, W) uint8, resampled in float.

    Args:
        images: On the boxes' device.
        boxes: (B, V); the flips may be 0 and 1.
        size: S.
        weights: Computes the resampling matrices.
    """
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
    """Compute weights (B, size, source) of bicubic, antialiased resampling of an interval of each image's axis.

    Keys' cubic convolution with a = -1/2, widened for downscaling, cut off at the ends of the interval and normalized:
    what Pillow and torchvision do to a crop.

    Args:
        start: First pixel of the interval (B,).
        length: Pixels of the interval (B,).
        flip: Whether the output is reversed (B,), bool.
        source: Pixels of the input axis.
        size: Pixels of the output axis.
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
