"""J and F of DAVIS: agreement of masks in region and in boundary, and its statistics over a video."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 0.008  # of the image's diagonal: boundaries within this distance agree
RECALL = 0.5  # frames above it count for the recall


class SequenceStats(NamedTuple):
    """Statistics of one object's metric over the frames of a video."""

    mean: float
    recall: float  # share of the frames above 0.5
    decay: float  # mean of the first quarter of the frames less that of the last


def region_similarity(masks: Tensor, targets: Tensor) -> Tensor:
    """Compute J, the IoU (...) float64 of masks (..., H, W) bool with true ones; 1 where both are empty.

    >>> region_similarity(torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]]))
    tensor(0.3333, dtype=torch.float64)
    """
    both, either = (pixels.sum((-2, -1)).double() for pixels in (masks & targets, masks | targets))
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def boundary_accuracy(masks: Tensor, targets: Tensor) -> Tensor:
    """Compute F, the harmonic mean (...) float64 of precision and recall of the boundaries of masks (..., H, W) bool.

    A boundary pixel is right if the other boundary passes within a distance of ceil(0.008 x diagonal) pixels
    (Perazzi et al. 2016, section 5; Martin et al. 2004; `f_measure` of the DAVIS-2017 evaluation). Two masks without a
    boundary agree; with one of them, F is 0.
    """
    radius = math.ceil(TOLERANCE * math.hypot(masks.shape[-2], masks.shape[-1]))
    edges, target_edges = boundaries(masks), boundaries(targets)
    right = (edges & dilate(target_edges, radius)).sum((-2, -1)).double()
    found = (target_edges & dilate(edges, radius)).sum((-2, -1)).double()
    count, target_count = (pixels.sum((-2, -1)).double() for pixels in (edges, target_edges))
    precision, recall = right / count.clamp_min(1), found / target_count.clamp_min(1)
    harmonic = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return torch.where((count == 0) & (target_count == 0), 1.0, harmonic)


def boundaries(masks: Tensor) -> Tensor:
    """Return the pixels (..., H, W) bool whose right, lower or lower right neighbor is across a mask's edge."""
    right = torch.cat([masks[..., 1:], masks[..., -1:]], dim=-1)
    below, below_right = (torch.cat([m[..., 1:, :], m[..., -1:, :]], dim=-2) for m in (masks, right))
    return (masks ^ right) | (masks ^ below) | (masks ^ below_right)


def dilate(pixels: Tensor, radius: int) -> Tensor:
    """Return the pixels (..., H, W) bool within a distance of `radius` from one that is set."""
    height, width = pixels.shape[-2:]
    reach = min(radius, height - 1)
    summed = F.pad(pixels.to(torch.int32), (radius + 1, radius)).cumsum(-1)  # along each row
    near = torch.zeros_like(pixels)
    for down in range(reach + 1):
        half = math.isqrt(radius**2 - down**2)  # of the disk's row
        run = summed[..., radius + 1 + half :][..., :width] > summed[..., radius - half :][..., :width]
        near[..., down:, :] |= run[..., : height - down, :]
        near[..., : height - down, :] |= run[..., down:, :]
    return near


def sequence_stats(values: Tensor) -> SequenceStats:
    """Compute mean, recall and decay of an object's values (frames,) as the DAVIS-2017 evaluation does."""
    frames = len(values)
    ends = [math.floor(1 + (frames - 1) * part / 4 + 0.5) - 1 for part in range(5)]  # of quarters that share their ends
    first, last = values[: ends[1] + 1].mean(), values[ends[3] : ends[4] + 1].mean()
    return SequenceStats(values.mean().item(), (values > RECALL).double().mean().item(), (first - last).item())
