"""How well masks and soft maps hit an object, in the measures of salient object detection, pixel by pixel.

Two published numbers are both called maxF. They differ in the weight of precision, in the place of the maximum, and by
several points; only numbers of one name compare:

- `maxF@0.3`: beta² = 0.3, F averaged over the images at each of the 255 thresholds, then the largest average
  (TokenCut, `unsupervised_saliency_detection/metric.py`, which LOST's saliency numbers come from as well).
- `maxF_selfmask`: beta² = 0.09 (0.3 squared again), each image at its own best threshold, then the average (SelfMask,
  `metrics/f_measure.py`; FOUND's numbers).

In both, a pixel is object where its value is above k / 255 for k = 0, ..., 254. TokenCut hands in its mask, not its
eigenvector, so that its published maxF without the bilateral solver is what is called `F@0.3` here. SelfMask and FOUND
hand in probabilities; ours have no such scale and are brought to 0..1 image by image, from their own least and
largest value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.evaluation.segmentation.iou import PatchCounts, iou

BETA_SQUARED = 0.3
BETA_SQUARED_SELFMASK = 0.09
LEVELS = 255  # thresholds k / 255


class SaliencyScores(NamedTuple):
    """What M masks, or soft maps, of one image are worth; stacked, of n images: (n, M)."""

    iou: Tensor  # (M,) of the masks
    accuracy: Tensor  # (M,) share of the pixels that the masks have right
    f: Tensor  # (M,) F of the masks, beta² = 0.3
    f_curve: Tensor  # (M, 255) float32: F of the soft maps at each threshold, beta² = 0.3
    f_selfmask: Tensor  # (M,) largest F of the soft maps over the thresholds, beta² = 0.09


def saliency_scores(
    soft: Tensor, masks: Tensor, truth: PatchCounts, *, object_: Tensor, counted: Tensor
) -> SaliencyScores:
    """What masks and soft maps of one image are worth.

    Args:
        soft: (M, rows, columns) float; enlarged to the image's size bilinearly, as SelfMask and FOUND do.
        masks: (M, rows, columns) bool; each pixel takes its patch's value.
        truth: The object, counted over the same rows and columns.
        object_: (H, W) bool: the object's pixels.
        counted: (H, W) bool: the pixels that count; the others are void.
    """
    chosen, inside = (masks * truth.pixels).sum((-2, -1)), (masks * truth.object).sum((-2, -1))
    area, all_pixels = truth.object.sum(), truth.pixels.sum()
    wrong = chosen + area - 2 * inside
    chosen_by_level, inside_by_level = count_levels(soft, object_, counted)
    return SaliencyScores(
        iou(masks, truth),
        1 - wrong / all_pixels,
        f_beta(inside, chosen, area, BETA_SQUARED),
        f_beta(inside_by_level, chosen_by_level, area, BETA_SQUARED).float(),
        f_beta(inside_by_level, chosen_by_level, area, BETA_SQUARED_SELFMASK).amax(-1),
    )


def f_beta(inside: Tensor, chosen: Tensor, area: Tensor, beta_squared: float) -> Tensor:
    """F (...): the mean of precision and recall, (1 + beta²) P R / (beta² P + R); 0 where nothing of it is found.

    Args:
        inside: (...) pixels that are chosen and object.
        chosen: (...) pixels that are chosen.
        area: Pixels that are object.
        beta_squared: 0 counts precision only; the larger, the more recall counts.

    >>> f_score(torch.tensor([6.0, 0.0]), torch.tensor([8.0, 0.0]), torch.tensor(12.0), 0.3)
    tensor([0.6724, 0.0000])
    """
    # With P = inside / chosen and R = inside / area the formula becomes this one, which is also defined where P is not.
    return (1 + beta_squared) * inside / (beta_squared * area + chosen).clamp(min=beta_squared)


def count_levels(soft: Tensor, object_: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """How many pixels of each soft map lie above each threshold k / 255, all of them and those of the object.

    Args:
        soft: (M, rows, columns) float. It is brought to 0..1, then enlarged bilinearly.
        object_: (H, W) bool.
        counted: (H, W) bool: the pixels that count.

    Returns:
        Two (M, 255) float64.
    """
    maps, size = len(soft), (object_.shape[0], object_.shape[1])
    scaled = F.interpolate(scale(soft)[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
    passed = (scaled[:, counted].double() * LEVELS).ceil().long().clamp(0, LEVELS)  # thresholds that a pixel is above
    places = passed + (LEVELS + 1) * torch.arange(maps)[:, None]
    result = []
    for values in (places, places[:, object_[counted]]):
        histogram = torch.bincount(values.flatten(), minlength=maps * (LEVELS + 1)).view(maps, LEVELS + 1)
        result.append(histogram.flip(-1).cumsum(-1).flip(-1)[:, 1:].double())  # above k / 255: at least k + 1 passed
    return result[0], result[1]


def scale(soft: Tensor) -> Tensor:
    """Maps (M, rows, columns) from their own least and largest value to 0..1; a constant one is cut to 0..1."""
    low, high = soft.amin((-2, -1), keepdim=True), soft.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (soft - low) / (high - low), soft.clamp(0, 1))


def max_f_threshold(curves: Tensor) -> tuple[Tensor, float]:
    """F (n,) of each image at the one threshold whose mean over the images is largest, and that threshold.

    Args:
        curves: (n, 255).
    """
    best = int(curves.mean(0, dtype=torch.float64).argmax())
    return curves[:, best].double(), best / LEVELS
