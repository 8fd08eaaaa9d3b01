"""Views of many images of one size at once, as matrix products."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ssl_vit.data.transforms.random_resized_crop import Boxes
from ssl_vit.data.transforms.separable_filter import bicubic_weights


class Weights(Protocol):
    """`bicubic_weights`, or what gives the same."""

    def __call__(self, start: Tensor, length: Tensor, flip: Tensor, *, source: int, size: int) -> Tensor: ...


def batched_resized_crop(dataset: Tensor, boxes: Boxes, *, size: int, weights: Weights) -> Tensor:
    """Views (B, V, C, S, S) uint8 of images (B, C, H, W) uint8, resampled in float.

    Args:
        dataset: On the boxes' device.
        boxes: (B, V); the flips may be 0 and 1.
        size: S.
        weights: Gives the matrices.
    """
    (batch, count), (channels, height, width) = boxes.top.shape, dataset.shape[1:]
    top, left, tall, wide, flip = (part.flatten() for part in boxes)
    rows = weights(top, tall, torch.zeros_like(flip).bool(), source=height, size=size)
    cols = weights(left, wide, flip.bool(), source=width, size=size)
    with torch.autocast(dataset.device.type, enabled=False):  # bfloat16 has fewer digits than a pixel
        across = dataset.float().flatten(1, 2) @ cols.view(batch, count * size, width).mT  # (B, C*H, V*S)
        # Clamped between the axes, as 8-bit resizers do.
        across = across.clamp_(0, 255).view(batch, channels, height, count, size).permute(0, 3, 1, 2, 4)
        views = rows.view(batch, count, 1, size, height) @ across
    return views.round_().clamp_(0, 255).to(torch.uint8)


def cached_bicubic_weights(start: Tensor, length: Tensor, flip: Tensor, *, source: int, size: int) -> Tensor:
    """What `bicubic_weights` gives, from a table: on a CPU far faster, and of 22 MB for 48 pixels to 48."""
    place = start * (2 * source - start + 1) // 2 + length - 1  # of the stretch among all, by start, then by length
    return _all_weights(source, size)[2 * place + flip]


@cache
def _all_weights(source: int, size: int) -> Tensor:
    """The weights (2 * stretches, size, source) of each stretch of an axis, forwards and backwards."""
    start, last = torch.triu_indices(source, source).repeat_interleave(2, dim=1)
    backwards = torch.arange(len(start)) % 2 == 1
    return bicubic_weights(start, last - start + 1, backwards, source=source, size=size)
