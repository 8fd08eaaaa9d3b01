"""Scores of the predicted masks of one image against its annotation: IoU, CorLoc, metrics of salient object detection.

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

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.annotations.object_masks import Annotation
from ssl_vit.evaluation.segmentation.iou import (
    PRIOR_SIDE,
    PatchCounts,
    area_mask,
    averages_of_others,
    corloc_hit,
    downsample_mask,
    iou,
    majority_patches,
    mass_curve,
    pool_mask_to_patches,
)
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.models.attention_maps import attention_mass_mask

BETA_SQUARED = 0.3
BETA_SQUARED_SELFMASK = 0.09
LEVELS = 255  # thresholds k / 255


class PredictedMasks(NamedTuple):
    """Attention maps and masks of one model for an image."""

    maps: Tensor | None  # (heads, rows, columns): attention, each sums to 1; None if it is not among the methods
    methods: dict[str, Segmentation]  # of patches by each method; refined ones of the image's pixels


class MaskScores(NamedTuple):
    """Scores of M masks and their score maps for one image; stacked, of n images: (n, M)."""

    iou: Tensor  # (M,) of the masks
    accuracy: Tensor  # (M,) share of the pixels that are classified correctly
    f: Tensor  # (M,) F of the masks, beta² = 0.3
    f_curve: Tensor  # (M, 255) float32: F of the score maps at each threshold, beta² = 0.3
    f_selfmask: Tensor  # (M,) largest F of the score maps over the thresholds, beta² = 0.09
    corloc: Tensor  # (M,) bool


class AttentionScores(NamedTuple):
    """Scores of the attention maps of the heads and, last, of their mean."""

    masks: MaskScores  # of heads + 1 masks
    ious: dict[str, Tensor]  # (heads + 1,) by rule: masks with the share `mass` of the attention, or of the true area
    curve: Tensor  # (19, heads + 1): IoU by the share of the attention inside the masks
    instance_ious: Tensor | None  # (objects, heads + 1): IoU with each object, with instance masks


def score_masks(score_maps: Tensor, masks: Tensor, annotation: Annotation) -> MaskScores:
    """Score masks (M, rows, columns) bool and their score maps (M, rows, columns) for one image, at its own size.

    Score maps are enlarged bilinearly, as SelfMask and FOUND do; of a mask each pixel takes its patch's value.
    """
    foreground, valid = annotation.foreground, annotation.valid
    target = pool_mask_to_patches(foreground, (masks.shape[-2], masks.shape[-1]), valid)
    chosen, inside = (masks * target.valid).sum((-2, -1)), (masks * target.foreground).sum((-2, -1))
    area = target.foreground.sum()
    wrong = chosen + area - 2 * inside
    chosen_by_level, inside_by_level = count_levels(score_maps, foreground, valid)
    size = (foreground.shape[0], foreground.shape[1])
    return MaskScores(
        iou(masks, target),
        1 - wrong / target.valid.sum(),
        f_beta(inside, chosen, area, BETA_SQUARED),
        f_beta(inside_by_level, chosen_by_level, area, BETA_SQUARED).float(),
        f_beta(inside_by_level, chosen_by_level, area, BETA_SQUARED_SELFMASK).amax(-1),
        torch.tensor([corloc_hit(mask, annotation.boxes, size) for mask in masks]),
    )


def score_attention(maps: Tensor, mass: float, annotation: Annotation) -> AttentionScores:
    """Score one image's attention maps (heads, rows, columns) with masks that hold a share of the attention."""
    grid = (maps.shape[-2], maps.shape[-1])
    target = pool_mask_to_patches(annotation.foreground, grid, annotation.valid)
    maps = torch.cat([maps, maps.mean(0, keepdim=True)])
    masks = attention_mass_mask(maps, mass)
    ious = {"mass": iou(masks, target), "area": iou(area_mask(maps, target), target)}
    instances = pool_instances(annotation, grid)
    instance_ious = torch.stack([iou(masks, instance) for instance in instances]) if instances else None
    return AttentionScores(score_masks(maps, masks, annotation), ious, mass_curve(maps, target), instance_ious)


def pool_instances(annotation: Annotation, grid: tuple[int, int]) -> list[PatchCounts]:
    """Count the pixels of each object within the patches of a grid; none without instance masks."""
    instances = () if annotation.instances is None else annotation.instances
    return [pool_mask_to_patches(instance, grid, annotation.valid) for instance in instances]


def mean_instance_iou(annotation: Annotation, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    """Compute the IoU () with each object, averaged over them, of a mask (rows, columns) or of its majority patches."""
    instances = pool_instances(annotation, grid)
    return torch.stack([iou(majority_patches(one) if mask is None else mask, one) for one in instances]).mean()


def resize_annotation(annotation: Annotation) -> Annotation:
    """Resize an annotation to a square of 64 x 64 cells, which is all that the center prior needs of an image."""
    height, width = annotation.foreground.shape
    return Annotation(
        downsample_mask(annotation.foreground),
        downsample_mask(annotation.valid),
        annotation.boxes * (PRIOR_SIDE / torch.tensor([width, height, width, height])),  # float, in cells
        None if annotation.instances is None else downsample_mask(annotation.instances),
        annotation.has_masks,
    )


def score_center_prior(annotations: list[Annotation], threshold: float) -> tuple[list[MaskScores], list[Tensor]]:
    """Score the average foreground of the other images in each of some resized images.

    Metrics and boxes do not change with the aspect, but for rounding to 64 cells.

    Returns:
        The scores, and the IoU () with each object, averaged over the objects; the latter empty without instance masks.
    """
    scores, instance_ious = [], []
    averages = averages_of_others(torch.stack([annotation.foreground for annotation in annotations]))
    for average, annotation in zip(averages, annotations, strict=True):
        mask = average >= threshold
        scores.append(score_masks(average[None], mask[None], annotation))
        if annotation.instances is not None:
            instance_ious.append(mean_instance_iou(annotation, (PRIOR_SIDE, PRIOR_SIDE), mask))
    return scores, instance_ious


def stack_mask_scores(images: list[MaskScores]) -> MaskScores:
    """Stack the scores of n images: (n, M)."""
    return MaskScores(*map(torch.stack, zip(*images, strict=True)))


def select_columns(scores: MaskScores, columns: Tensor) -> MaskScores:
    """Select one mask (n,) int64 per image from the stacked scores (n, M), as (n, 1)."""
    rows = torch.arange(len(columns))
    return MaskScores(*(values[rows, columns][:, None] for values in scores))


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
