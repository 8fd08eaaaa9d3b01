"""IoU of attention masks with given object masks, by every head rule, beside what needs no learning.

All IoUs are those at the image's own size. A mask of patches is constant within each patch, so that the object's
pixels need to be counted once per patch and no mask has to be enlarged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.annotations.object_masks import component_boxes
from ssl_vit.models.attention_maps import attention_mass_mask, patch_of_pixel, topk_mask, upsample_mask

OUTLINE = 64  # a dataset-average mask has this many cells a side
THRESHOLDS = torch.arange(1, 20, dtype=torch.float64) / 20


class PatchCounts(NamedTuple):
    """A given object mask, counted over the patches of a grid."""

    object: Tensor  # (rows, columns) float64: pixels of the object within each patch
    pixels: Tensor  # (rows, columns) float64: all pixels within each patch, void ones left out


def pool_mask_to_patches(mask: Tensor, grid: tuple[int, int], counted: Tensor | None = None) -> PatchCounts:
    """Count an object mask (H, W) bool over a grid of (rows, columns).

    Args:
        mask: The object, without void pixels.
        grid: Of patches.
        counted: (H, W) bool, False where a pixel is void: it is neither in the intersection nor in the union then.
    """
    (height, width), (rows, columns) = mask.shape, grid
    patch = patch_of_pixel(height, rows)[:, None] * columns + patch_of_pixel(width, columns)  # (H, W)
    pixels = torch.bincount(patch.flatten() if counted is None else patch[counted], minlength=rows * columns).double()
    inside = torch.bincount(patch[mask], minlength=rows * columns).double()
    return PatchCounts(inside.view(grid), pixels.view(grid))


def iou(masks: Tensor, truth: PatchCounts) -> Tensor:
    """Intersection over union (...) of masks of patches (..., rows, columns) with the object, in pixels."""
    inside = (masks * truth.object).sum((-2, -1))
    return inside / ((masks * truth.pixels).sum((-2, -1)) + truth.object.sum() - inside).clamp(min=1)


class HeadIoU(NamedTuple):
    """IoUs of one or more images."""

    heads: Tensor  # (..., heads): the mask of each head
    mean: Tensor  # (...): the mask of the heads' mean map


class IoUByRule(NamedTuple):
    """The IoUs of one model's maps by both threshold rules."""

    mass: HeadIoU  # the fewest patches with a share of the attention
    area: HeadIoU  # as many patches as the object has: knows the object's size, so it is no prediction


def score_heads(maps: Tensor, truth: PatchCounts, mass: float) -> IoUByRule:
    """IoUs of one image's maps (heads, rows, columns)."""
    share = truth.object.sum() / truth.pixels.sum()
    count = max(1, round(share.item() * truth.object.numel()))
    maps = torch.cat([maps, maps.mean(0, keepdim=True)])
    by_mass, by_area = iou(attention_mass_mask(maps, mass), truth), iou(topk_mask(maps, count), truth)
    return IoUByRule(HeadIoU(by_mass[:-1], by_mass[-1]), HeadIoU(by_area[:-1], by_area[-1]))


def stack_scores(dataset: list[IoUByRule]) -> IoUByRule:
    """The scores of n images as one: (n, heads) and (n,)."""
    rules = zip(*dataset, strict=True)
    return IoUByRule(*(HeadIoU(*map(torch.stack, zip(*rule, strict=True))) for rule in rules))


def oracle_head(scores: HeadIoU) -> Tensor:
    """IoU (n,) of each image's best head: an upper bound that grows with the number of heads."""
    return scores.heads.amax(-1)


def mass_curve(maps: Tensor, truth: PatchCounts) -> Tensor:
    """IoUs (19, maps) of one image's maps (maps, rows, columns), holding .05, .10, ..., .95 of the attention."""
    return torch.stack([iou(attention_mass_mask(maps, mass), truth) for mass in THRESHOLDS.tolist()])


def cross_validated_head(scores: HeadIoU, seed: int) -> tuple[Tensor, list[int]]:
    """IoU (n,) of one head for all images, chosen on other images than it is scored on.

    Args:
        scores: Of at least two images.
        seed: Of the split.

    Returns:
        The IoU of each image, and the two heads that were chosen.
    """
    heads, chosen = choose_heads(scores.heads, seed)
    return scores.heads.gather(1, heads[:, None])[:, 0], chosen


def choose_heads(scores: Tensor, seed: int) -> tuple[Tensor, list[int]]:
    """The fixed head for each image (n,) int64, by the scores (n, heads) of other images.

    The images are split at random into two halves; the head with the best mean score on either half serves the
    other one.

    Returns:
        The head of each image, and the two heads that were chosen.
    """
    count = len(scores)
    first = torch.zeros(count, dtype=torch.bool)
    first[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 2]] = True
    chosen = [int(scores[half].mean(0).argmax()) for half in (first, ~first)]
    return torch.where(first, chosen[1], chosen[0]), chosen


def majority_patches(truth: PatchCounts) -> Tensor:
    """Every patch that is mostly object (rows, columns) bool: no mask of patches has more pixels right.

    Its IoU is near the largest that patches can have, but not always the largest: an object that fills no patch by
    half has none.
    """
    return truth.object > truth.pixels / 2


def downsample_mask(mask: Tensor) -> Tensor:
    """Masks (..., H, W) bool, squashed to (..., 64, 64) bool: all that the center prior keeps of an image."""
    return upsample_mask(mask, (OUTLINE, OUTLINE))


def center_prior(outlines: Tensor) -> tuple[Tensor, float]:
    """IoU (n,) of the dataset-average mask: what the objects' places alone are worth.

    Each image is scored against the average of the other images' masks (n, 64, 64) bool. The threshold is the best
    of .05, .10, ..., .95 on these very images, which flatters this baseline.

    Args:
        outlines: Of at least two images, squashed to a square; IoU does not change with the squashing.

    Returns:
        The IoU of each image, and the threshold.
    """
    total = outlines.sum(0)  # (64, 64)
    curves = torch.stack([_iou_by_threshold((total - own.long()) / (len(outlines) - 1), own) for own in outlines])
    best = int(curves.mean(0).argmax())
    return curves[:, best], THRESHOLDS[best].item()


def _iou_by_threshold(average: Tensor, own: Tensor) -> Tensor:
    masks = average >= THRESHOLDS[:, None, None]  # (thresholds, 64, 64)
    return (masks & own).sum((-2, -1)).double() / (masks | own).sum((-2, -1)).clamp(min=1)


CORLOC_IOU = 0.5  # least IoU with any given box (Deselaers et al. 2010)


def largest_box(mask: Tensor, size: tuple[int, int]) -> Tensor | None:
    """The box (4,) in pixels around the largest part of a mask of patches (rows, columns) bool; None for an empty one.

    Args:
        mask: Its parts are those of patches that touch by their sides.
        size: Height and width of the image.
    """
    boxes = component_boxes(mask)
    if not len(boxes):
        return None
    left, top, right, bottom = boxes[0].tolist()
    rows, columns = (patch_of_pixel(side, patches) for side, patches in zip(size, mask.shape, strict=True))
    return torch.stack(
        [
            torch.searchsorted(columns, left),  # the first pixel of the first patch
            torch.searchsorted(rows, top),
            torch.searchsorted(columns, right),
            torch.searchsorted(rows, bottom),
        ]
    )


def box_iou(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union (n,) of a box (4,) with others (n, 4).

    >>> box_iou(torch.tensor([0, 0, 2, 2]), torch.tensor([[0, 0, 2, 2], [1, 0, 3, 2], [2, 0, 3, 2]])).round(decimals=2)
    tensor([1.0000, 0.3300, 0.0000])
    """
    corner, end = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    common = (end - corner).clamp(min=0).prod(-1)
    areas = (others[:, 2:] - others[:, :2]).prod(-1) + (box[2:] - box[:2]).prod()
    return common / (areas - common)


def corloc_hit(mask: Tensor, boxes: Tensor, size: tuple[int, int]) -> bool:
    """Whether the box of a mask's largest part (rows, columns) has an IoU of at least .5 with any given box (n, 4)."""
    box = largest_box(mask, size)
    return box is not None and bool((box_iou(box, boxes) >= CORLOC_IOU).any())
