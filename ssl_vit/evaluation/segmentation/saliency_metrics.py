"""Metrics of salient object detection for masks and score maps, pixel by pixel.

Two published metrics are both called maxF. They differ in the weight of precision, in where the maximum is taken, and
by several points; only numbers of one name compare:

- `maxF@0.3`: beta² = 0.3, F averaged over the images at each of the 255 thresholds, then the largest average
  (TokenCut, `unsupervised_saliency_detection/metric.py`, which LOST's saliency numbers come from as well).
- `maxF_selfmask`: beta² = 0.09 (0.3 squared again), each image at its own best threshold, then the average (SelfMask,
  `metrics/f_measure.py`; FOUND's numbers).

In both, a pixel is foreground where its value is above k / 255 for k = 0, ..., 254. TokenCut evaluates its mask, not
its eigenvector, so that its published maxF without the bilateral solver is `F@0.3` here. SelfMask and FOUND evaluate
probabilities; score maps have no such scale and are scaled to [0, 1] image by image, from their own minimum and
maximum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BETA_SQUARED = 0.3
BETA_SQUARED_SELFMASK = 0.09
LEVELS = 255  # thresholds k / 255


def f_beta(inside: Tensor, chosen: Tensor, area: Tensor, beta_squared: float) -> Tensor:
    """Compute F (...) of precision and recall, (1 + beta²) P R / (beta² P + R); 0 where nothing is found.

    `chosen` (...) are pixels of masks, `inside` those of them that are foreground, `area` all of the foreground. With a
    beta² of 0 it is precision alone; the larger, the more weight has recall.

    Example:
        >>> f_beta(torch.tensor([6.0, 0.0]), torch.tensor([8.0, 0.0]), torch.tensor(12.0), 0.3)
        tensor([0.6724, 0.0000])
    """
    # With P = inside / chosen and R = inside / area the formula becomes this one, which is also defined where P is not.
    return (1 + beta_squared) * inside / (beta_squared * area + chosen).clamp(min=beta_squared)


def count_levels(score_maps: Tensor, foreground: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Count the pixels of each score map above each threshold k / 255: all valid ones and those in the foreground.

    Maps (M, rows, columns) are scaled to [0, 1], then enlarged bilinearly to the foreground (H, W) bool and the valid
    pixels (H, W) bool. The counts are (M, 255) float64.
    """
    maps, size = len(score_maps), (foreground.shape[0], foreground.shape[1])
    scaled = F.interpolate(scale_maps(score_maps)[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
    passed = (scaled[:, valid].double() * LEVELS).ceil().long().clamp(0, LEVELS)  # thresholds that a pixel is above
    bins = passed + (LEVELS + 1) * torch.arange(maps)[:, None]
    result = []
    for values in (bins, bins[:, foreground[valid]]):
        histogram = torch.bincount(values.flatten(), minlength=maps * (LEVELS + 1)).view(maps, LEVELS + 1)
        result.append(histogram.flip(-1).cumsum(-1).flip(-1)[:, 1:].double())  # above k / 255: at least k + 1 passed
    return result[0], result[1]


def scale_maps(maps: Tensor) -> Tensor:
    """Scale maps (M, rows, columns) from their own minimum and maximum to [0, 1]; a constant map is clamped."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), maps.clamp(0, 1))


def max_f_threshold(curves: Tensor) -> tuple[Tensor, float]:
    """Return F (n,) of each image, of (n, 255), at the threshold with the largest mean, and that threshold."""
    best = int(curves.mean(0, dtype=torch.float64).argmax())
    return curves[:, best].double(), best / LEVELS
