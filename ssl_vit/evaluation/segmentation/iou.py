"""IoU of masks of patches with ground truth: every rule of choosing a head, the center prior, CorLoc.

All IoUs are those at the image's own size. A mask of patches is constant within each patch, so that the foreground
pixels are counted once per patch and no mask has to be enlarged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ssl_vit.data.annotations.object_masks import component_boxes
from ssl_vit.models.attention_maps import attention_mass_mask, patch_of_pixel, topk_mask, upsample_mask

PRIOR_SIDE = 64  # cells a side of the masks that the center prior averages
THRESHOLDS = torch.arange(1, 20, dtype=torch.float64) / 20
CORLOC_IOU = 0.5  # least IoU with any ground-truth box (Deselaers et al. 2010)


class PatchCounts(NamedTuple):
    """Pixels of a ground-truth mask within each patch of a grid."""

    foreground: Tensor  # (rows, columns) float64
    valid: Tensor  # (rows, columns) float64: all but void ones


def pool_mask_to_patches(mask: Tensor, grid: tuple[int, int], valid: Tensor | None = None) -> PatchCounts:
    """Count the pixels of a foreground mask (H, W) bool within each patch of a grid (rows, columns).

    Void pixels, where `valid` (H, W) is False, belong neither to intersections nor to unions.
    """
    (height, width), (rows, columns) = mask.shape, grid
    patch = patch_of_pixel(height, rows)[:, None] * columns + patch_of_pixel(width, columns)  # (H, W)
    pixels = torch.bincount(patch.flatten() if valid is None else patch[valid], minlength=rows * columns).double()
    foreground = torch.bincount(patch[mask], minlength=rows * columns).double()
    return PatchCounts(foreground.view(grid), pixels.view(grid))


def iou(masks: Tensor, target: PatchCounts) -> Tensor:
    """Compute the IoU (...) in pixels of masks of patches (..., rows, columns) with the foreground."""
    inside = (masks * target.foreground).sum((-2, -1))
    return inside / ((masks * target.valid).sum((-2, -1)) + target.foreground.sum() - inside).clamp(min=1)


def area_mask(maps: Tensor, target: PatchCounts) -> Tensor:
    """Return as many top patches of maps (..., rows, columns) as the foreground has, whose area is no prediction."""
    share = target.foreground.sum() / target.valid.sum()
    return topk_mask(maps, max(1, round(share.item() * target.foreground.numel())))


def mass_curve(maps: Tensor, target: PatchCounts) -> Tensor:
    """Compute the IoUs (19, maps) of maps (maps, rows, columns) for masks with .05, .10, ..., .95 of the attention."""
    return torch.stack([iou(attention_mass_mask(maps, mass), target) for mass in THRESHOLDS.tolist()])


def choose_heads(scores: Tensor, seed: int) -> tuple[Tensor, list[int]]:
    """Choose the fixed head for each image (n,) int64 by the scores (n, heads) of other images, for n > 1.

    The images are split at random into two halves; the head with the best mean score on either half is used for the
    other one. The two heads are returned, too.
    """
    count = len(scores)
    first = torch.zeros(count, dtype=torch.bool)
    first[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 2]] = True
    chosen = [int(scores[half].mean(0).argmax()) for half in (first, ~first)]
    return torch.where(first, chosen[1], chosen[0]), chosen


def cross_validated_iou(scores: Tensor, seed: int) -> tuple[Tensor, list[int]]:
    """Return the IoU (n,) of the fixed head from those of all heads (n, heads), and the two heads that were chosen."""
    heads, chosen = choose_heads(scores, seed)
    return scores.gather(1, heads[:, None])[:, 0], chosen


def majority_patches(target: PatchCounts) -> Tensor:
    """Return the patches (rows, columns) bool that are mostly foreground: no mask has more pixels right.

    Its IoU is near the largest, not always the largest: an object that fills no patch by half has none.
    """
    return target.foreground > target.valid / 2


def downsample_mask(mask: Tensor) -> Tensor:
    """Resize masks (..., H, W) bool to a square of (..., 64, 64) for the center prior."""
    return upsample_mask(mask, (PRIOR_SIDE, PRIOR_SIDE))


def averages_of_others(masks: Tensor) -> Iterator[Tensor]:
    """Yield for each of n > 1 masks (n, 64, 64) bool the average (64, 64) float32 of the others."""
    total = masks.sum(0)
    for own in masks:
        yield (total - own.long()) / (len(masks) - 1)


def center_prior(masks: Tensor) -> tuple[Tensor, float]:
    """Compute the IoU (n,) of the dataset-average mask: what the positions of objects alone are worth.

    Each image is scored against the average of the other images' masks (n, 64, 64) bool, resized to a square; IoU does
    not change with the aspect. The threshold, which is returned, too, is the best of .05, .10, ..., .95 on these very
    images, which favors this baseline.
    """
    curves = []
    for average, own in zip(averages_of_others(masks), masks, strict=True):
        chosen = average >= THRESHOLDS[:, None, None]  # (thresholds, 64, 64)
        curves.append((chosen & own).sum((-2, -1)).double() / (chosen | own).sum((-2, -1)).clamp(min=1))
    by_threshold = torch.stack(curves)  # (n, thresholds)
    best = int(by_threshold.mean(0).argmax())
    return by_threshold[:, best], THRESHOLDS[best].item()


def largest_box(mask: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Return the box (4,) in pixels around the largest part of a mask of patches (rows, columns) bool; None if empty.

    Parts are connected by sides of patches; `size` is the height and width of the image.
    """
    boxes = component_boxes(mask)
    if not len(boxes):
        return None
    left, top, right, bottom = boxes[0].tolist()
    rows, columns = (patch_of_pixel(side, patches) for side, patches in zip(size, mask.shape, strict=True))
    # The first pixel of the first patch, and that of the first patch outside.
    corners = ((columns, left), (rows, top), (columns, right), (rows, bottom))
    return torch.stack([torch.searchsorted(patches, patch) for patches, patch in corners])


def corloc_hit(mask: Tensor, boxes: Tensor, size: tuple[int, int]) -> bool:
    """Return whether the box of a mask's largest part (rows, columns) has an IoU of at least .5 with a box (n, 4)."""
    box = largest_box(mask, size)
    return box is not None and bool((box_iou(box[None].to(boxes), boxes) >= CORLOC_IOU).any())
