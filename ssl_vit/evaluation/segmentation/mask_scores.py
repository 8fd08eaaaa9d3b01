"""Scores of the predicted masks of one image against its annotation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.annotations.object_masks import Annotation
from ssl_vit.evaluation.segmentation.iou import (
    PRIOR_SIDE,
    corloc_hit,
    downsample_mask,
    iou,
    majority_patches,
    mass_curve,
    pool_mask_to_patches,
    score_heads,
)
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.evaluation.segmentation.saliency_metrics import BETA_SQUARED, BETA_SQUARED_SELFMASK, count_levels, f_beta
from ssl_vit.models.attention_maps import attention_mass_mask


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
    ious: dict[str, Tensor]  # (heads + 1,) by rule
    curve: Tensor  # (19, heads + 1): IoU by the share of the attention inside the masks
    instance_ious: Tensor | None  # (objects, heads + 1): IoU with each object, with instance masks


def score_masks(score_maps: Tensor, masks: Tensor, annotation: Annotation) -> MaskScores:
    """Score masks and their score maps for one image.

    Args:
        score_maps: (M, rows, columns) float; enlarged to the image's size bilinearly, as SelfMask and FOUND do.
        masks: (M, rows, columns) bool; each pixel takes its patch's value.
        annotation: Of the image, at its own size.
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
    by_rule = score_heads(maps, target, mass)
    maps = torch.cat([maps, maps.mean(0, keepdim=True)])
    masks = attention_mass_mask(maps, mass)
    instance_ious = None
    if annotation.instances is not None:
        targets = [pool_mask_to_patches(instance, grid, annotation.valid) for instance in annotation.instances]
        instance_ious = torch.stack([iou(masks, instance) for instance in targets])
    return AttentionScores(score_masks(maps, masks, annotation), by_rule, mass_curve(maps, target), instance_ious)


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


def prior_maps(annotations: list[Annotation]) -> list[Tensor]:
    """Compute for each resized annotation the average foreground (64, 64) float32 of the other images."""
    total = torch.stack([annotation.foreground for annotation in annotations]).sum(0)
    return [(total - own.foreground.long()).float() / (len(annotations) - 1) for own in annotations]


def score_center_prior(annotations: list[Annotation], threshold: float) -> list[MaskScores]:
    """Score the average foreground of the other images in each image.

    Metrics and boxes do not change with the aspect, but for rounding to 64 cells.
    """
    averages = zip(prior_maps(annotations), annotations, strict=True)
    return [score_masks(average[None], (average >= threshold)[None], own) for average, own in averages]


def center_prior_instance_iou(annotations: list[Annotation], threshold: float) -> Tensor:
    """Compute the IoU (n,) of the center prior with each image's objects, averaged over the objects."""
    averages = zip(prior_maps(annotations), annotations, strict=True)
    return torch.stack([mean_instance_iou(average >= threshold, own) for average, own in averages])


def mean_instance_iou(mask: Tensor, annotation: Annotation) -> Tensor:
    """Compute the IoU () of a mask of patches (rows, columns) with each object, averaged over the objects."""
    assert annotation.instances is not None
    grid = (mask.shape[-2], mask.shape[-1])
    targets = [pool_mask_to_patches(instance, grid, annotation.valid) for instance in annotation.instances]
    return torch.stack([iou(mask, target) for target in targets]).mean()


def ceiling_instance_iou(annotation: Annotation, grid: tuple[int, int]) -> Tensor:
    """Compute the IoU () of each object's majority patches with the object itself, averaged over the objects."""
    assert annotation.instances is not None
    targets = [pool_mask_to_patches(instance, grid, annotation.valid) for instance in annotation.instances]
    return torch.stack([iou(majority_patches(target), target) for target in targets]).mean()


def stack_mask_scores(images: list[MaskScores]) -> MaskScores:
    """Stack the scores of n images: (n, M)."""
    return MaskScores(*map(torch.stack, zip(*images, strict=True)))


def select_columns(scores: MaskScores, columns: Tensor) -> MaskScores:
    """Select one mask (n,) int64 per image from the stacked scores (n, M), as (n, 1)."""
    rows = torch.arange(len(columns))
    return MaskScores(*(values[rows, columns][:, None] for values in scores))
