"""What is found in one picture, and what it is worth by everything that is given of the picture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.attention.boxes import LOCATED, box_iou, largest_box, located
from ssl_vit.attention.masks import mass_mask
from ssl_vit.attention.metrics import (
    OUTLINE,
    Scores,
    count_truth,
    iou,
    majority,
    mass_curve,
    outline,
    score,
)
from ssl_vit.attention.saliency import Measures, measure
from ssl_vit.attention.segmentation import Segmentation
from ssl_vit.attention.truth import Annotation


class Objects(NamedTuple):
    """What one network finds in a picture."""

    maps: Tensor | None  # (heads, rows, columns): attention, each sums to 1; None where it is not wanted
    methods: dict[str, Segmentation]  # of patches by each method; refined ones of the picture's pixels


class Marks(NamedTuple):
    """What M masks with their soft maps are worth; stacked, of n pictures: (n, M)."""

    measures: Measures
    located: Tensor  # (M,) bool


class AttentionMarks(NamedTuple):
    """What the maps of the heads, and last their mean, are worth."""

    marks: Marks  # of heads + 1 masks
    scores: Scores
    curve: Tensor  # (19, heads + 1): IoU by the share of the attention that the masks hold
    objects: Tensor | None  # (objects, heads + 1): IoU with each object, where they are told apart


def mark(soft: Tensor, masks: Tensor, annotation: Annotation) -> Marks:
    """What masks (M, rows, columns) bool and their soft maps (M, rows, columns) are worth in one picture."""
    size = (annotation.object.shape[0], annotation.object.shape[1])
    truth = count_truth(annotation.object, (soft.shape[-2], soft.shape[-1]), annotation.counted)
    hits = torch.tensor([located(mask, annotation.boxes, size) for mask in masks])
    return Marks(measure(soft, masks, truth, object_=annotation.object, counted=annotation.counted), hits)


def mark_attention(maps: Tensor, mass: float, annotation: Annotation) -> AttentionMarks:
    """What one picture's attention maps (heads, rows, columns) are worth, cut at a share of the attention."""
    grid = (maps.shape[-2], maps.shape[-1])
    truth = count_truth(annotation.object, grid, annotation.counted)
    scores = score(maps, truth, mass)
    maps = torch.cat([maps, maps.mean(0, keepdim=True)])
    masks = mass_mask(maps, mass)
    objects = None
    if annotation.instances is not None:
        truths = [count_truth(instance, grid, annotation.counted) for instance in annotation.instances]
        objects = torch.stack([iou(masks, of_object) for of_object in truths])
    return AttentionMarks(mark(maps, masks, annotation), scores, mass_curve(maps, truth), objects)


class Squashed(NamedTuple):
    """All that the centre prior keeps of a picture, squashed to a square of 64 x 64 cells."""

    object: Tensor  # (64, 64) bool
    counted: Tensor  # (64, 64) bool
    boxes: Tensor  # (boxes, 4) float, in cells
    instances: Tensor | None  # (objects, 64, 64) bool, where objects are told apart


def squash(annotation: Annotation) -> Squashed:
    """What is given of a picture, without its size."""
    height, width = annotation.object.shape
    cells = annotation.boxes * (OUTLINE / torch.tensor([width, height, width, height]))
    instances = None if annotation.instances is None else outline(annotation.instances)
    return Squashed(outline(annotation.object), outline(annotation.counted), cells, instances)


def mark_prior(pictures: list[Squashed], threshold: float) -> list[Marks]:
    """What the average of the other pictures' objects is worth in each picture.

    Measures and boxes do not change with the squashing, but for rounding to 64 cells.
    """
    total = torch.stack([picture.object for picture in pictures]).sum(0)
    marks = []
    for own in pictures:
        average = (total - own.object.long()).float() / (len(pictures) - 1)  # (64, 64)
        mask = average >= threshold
        truth = count_truth(own.object, (OUTLINE, OUTLINE), own.counted)
        measures = measure(average[None], mask[None], truth, object_=own.object, counted=own.counted)
        box = largest_box(mask, (OUTLINE, OUTLINE))
        hit = box is not None and bool((box_iou(box, own.boxes) >= LOCATED).any())
        marks.append(Marks(measures, torch.tensor([hit])))
    return marks


def prior_by_object(pictures: list[Squashed], threshold: float) -> Tensor:
    """IoU (n,) of the same average with each picture's objects, one by one, in the mean over these."""
    total = torch.stack([picture.object for picture in pictures]).sum(0)
    ious = []
    for own in pictures:
        assert own.instances is not None
        mask = (total - own.object.long()).float() / (len(pictures) - 1) >= threshold  # (64, 64)
        ious.append(mean_over_objects(mask, own.instances, own.counted))
    return torch.stack(ious)


def mean_over_objects(mask: Tensor, instances: Tensor, counted: Tensor) -> Tensor:
    """IoU () of a mask of patches (rows, columns) with each object (objects, H, W), in the mean over these."""
    grid = (mask.shape[-2], mask.shape[-1])
    return torch.stack([iou(mask, count_truth(instance, grid, counted)) for instance in instances]).mean()


def ceiling_by_object(instances: Tensor, counted: Tensor, grid: tuple[int, int]) -> Tensor:
    """IoU () of each object's majority patches with the object itself, in the mean over the objects (objects, H, W)."""
    truths = [count_truth(instance, grid, counted) for instance in instances]
    return torch.stack([iou(majority(truth), truth) for truth in truths]).mean()


def stack_marks(pictures: list[Marks]) -> Marks:
    """The marks of n pictures as one: (n, M)."""
    measures = Measures(*map(torch.stack, zip(*(picture.measures for picture in pictures), strict=True)))
    return Marks(measures, torch.stack([picture.located for picture in pictures]))


def pick(marks: Marks, columns: Tensor) -> Marks:
    """Of the stacked marks (n, M) of n pictures one mask each, (n,) int64, as (n, 1)."""
    rows = torch.arange(len(columns))
    return Marks(
        Measures(*(values[rows, columns][:, None] for values in marks.measures)), marks.located[rows, columns][:, None]
    )
