"""What is found in one image, and what it is worth by everything that is given of the image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.annotations.object_masks import Annotation
from ssl_vit.evaluation.segmentation.iou import (
    CORLOC_IOU,
    OUTLINE,
    IoUByRule,
    box_iou,
    corloc_hit,
    downsample_mask,
    iou,
    largest_box,
    majority_patches,
    mass_curve,
    pool_mask_to_patches,
    score_heads,
)
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.evaluation.segmentation.saliency_metrics import SaliencyScores, saliency_scores
from ssl_vit.models.attention_maps import attention_mass_mask


class PredictedMasks(NamedTuple):
    """What one model finds in an image."""

    maps: Tensor | None  # (heads, rows, columns): attention, each sums to 1; None where it is not wanted
    methods: dict[str, Segmentation]  # of patches by each method; refined ones of the image's pixels


class MaskScores(NamedTuple):
    """What M masks with their soft maps are worth; stacked, of n images: (n, M)."""

    measures: SaliencyScores
    located: Tensor  # (M,) bool


class AttentionScores(NamedTuple):
    """What the maps of the heads, and last their mean, are worth."""

    marks: MaskScores  # of heads + 1 masks
    scores: IoUByRule
    curve: Tensor  # (19, heads + 1): IoU by the share of the attention that the masks hold
    objects: Tensor | None  # (objects, heads + 1): IoU with each object, where they are told apart


def score_masks(soft: Tensor, masks: Tensor, annotation: Annotation) -> MaskScores:
    """What masks (M, rows, columns) bool and their soft maps (M, rows, columns) are worth in one image."""
    size = (annotation.foreground.shape[0], annotation.foreground.shape[1])
    truth = pool_mask_to_patches(annotation.foreground, (soft.shape[-2], soft.shape[-1]), annotation.valid)
    hits = torch.tensor([corloc_hit(mask, annotation.boxes, size) for mask in masks])
    return MaskScores(
        saliency_scores(soft, masks, truth, object_=annotation.foreground, counted=annotation.valid), hits
    )


def mark_attention(maps: Tensor, mass: float, annotation: Annotation) -> AttentionScores:
    """What one image's attention maps (heads, rows, columns) are worth, cut at a share of the attention."""
    grid = (maps.shape[-2], maps.shape[-1])
    truth = pool_mask_to_patches(annotation.foreground, grid, annotation.valid)
    scores = score_heads(maps, truth, mass)
    maps = torch.cat([maps, maps.mean(0, keepdim=True)])
    masks = attention_mass_mask(maps, mass)
    objects = None
    if annotation.instances is not None:
        truths = [pool_mask_to_patches(instance, grid, annotation.valid) for instance in annotation.instances]
        objects = torch.stack([iou(masks, of_object) for of_object in truths])
    return AttentionScores(score_masks(maps, masks, annotation), scores, mass_curve(maps, truth), objects)


class PriorSample(NamedTuple):
    """All that the center prior keeps of an image, squashed to a square of 64 x 64 cells."""

    object: Tensor  # (64, 64) bool
    counted: Tensor  # (64, 64) bool
    boxes: Tensor  # (boxes, 4) float, in cells
    instances: Tensor | None  # (objects, 64, 64) bool, where objects are told apart


def resize_annotation(annotation: Annotation) -> PriorSample:
    """What is given of an image, without its size."""
    height, width = annotation.foreground.shape
    cells = annotation.boxes * (OUTLINE / torch.tensor([width, height, width, height]))
    instances = None if annotation.instances is None else downsample_mask(annotation.instances)
    return PriorSample(downsample_mask(annotation.foreground), downsample_mask(annotation.valid), cells, instances)


def mark_prior(dataset: list[PriorSample], threshold: float) -> list[MaskScores]:
    """What the average of the other images' objects is worth in each image.

    Measures and boxes do not change with the squashing, but for rounding to 64 cells.
    """
    total = torch.stack([image.object for image in dataset]).sum(0)
    marks = []
    for own in dataset:
        average = (total - own.object.long()).float() / (len(dataset) - 1)  # (64, 64)
        mask = average >= threshold
        truth = pool_mask_to_patches(own.object, (OUTLINE, OUTLINE), own.counted)
        measures = saliency_scores(average[None], mask[None], truth, object_=own.object, counted=own.counted)
        box = largest_box(mask, (OUTLINE, OUTLINE))
        hit = box is not None and bool((box_iou(box, own.boxes) >= CORLOC_IOU).any())
        marks.append(MaskScores(measures, torch.tensor([hit])))
    return marks


def prior_by_object(dataset: list[PriorSample], threshold: float) -> Tensor:
    """IoU (n,) of the same average with each image's objects, one by one, in the mean over these."""
    total = torch.stack([image.object for image in dataset]).sum(0)
    ious = []
    for own in dataset:
        assert own.instances is not None
        mask = (total - own.object.long()).float() / (len(dataset) - 1) >= threshold  # (64, 64)
        ious.append(mean_over_objects(mask, own.instances, own.counted))
    return torch.stack(ious)


def mean_over_objects(mask: Tensor, instances: Tensor, counted: Tensor) -> Tensor:
    """IoU () of a mask of patches (rows, columns) with each object (objects, H, W), in the mean over these."""
    grid = (mask.shape[-2], mask.shape[-1])
    return torch.stack([iou(mask, pool_mask_to_patches(instance, grid, counted)) for instance in instances]).mean()


def ceiling_by_object(instances: Tensor, counted: Tensor, grid: tuple[int, int]) -> Tensor:
    """IoU () of each object's majority patches with the object itself, in the mean over the objects (objects, H, W)."""
    truths = [pool_mask_to_patches(instance, grid, counted) for instance in instances]
    return torch.stack([iou(majority_patches(truth), truth) for truth in truths]).mean()


def stack_marks(dataset: list[MaskScores]) -> MaskScores:
    """The marks of n images as one: (n, M)."""
    measures = SaliencyScores(*map(torch.stack, zip(*(image.measures for image in dataset), strict=True)))
    return MaskScores(measures, torch.stack([image.located for image in dataset]))


def select_columns(marks: MaskScores, columns: Tensor) -> MaskScores:
    """Of the stacked marks (n, M) of n images one mask each, (n,) int64, as (n, 1)."""
    rows = torch.arange(len(columns))
    return MaskScores(
        SaliencyScores(*(values[rows, columns][:, None] for values in marks.measures)),
        marks.located[rows, columns][:, None],
    )
