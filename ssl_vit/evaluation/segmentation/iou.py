"""IoU of masks of patches with ground truth: every rule of choosing a head, the center prior, CorLoc.

All IoUs are those at the image's own size. A mask of patches is constant within each patch, so that the foreground
pixels are counted once per patch and no mask has to be enlarged.
"""

from __future__ import annotations

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

    Args:
        mask: Foreground, without void pixels.
        grid: Rows and columns of patches.
        valid: (H, W) bool, False for void pixels, which then belong neither to intersections nor to unions.
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


def score_heads(maps: Tensor, target: PatchCounts, mass: float) -> dict[str, Tensor]:
    """Compute the IoUs (heads + 1,) of one image's attention maps (heads, rows, columns) and, last, of their mean.

    Returns:
        By rule: `mass`, the fewest patches that hold a share of the attention; `area`, as many patches as the
        foreground has, which knows the area and so is no prediction.
    """
    share = target.foreground.sum() / target.valid.sum()
    count = max(1, round(share.item() * target.foreground.numel()))
    maps = torch.cat([maps, maps.mean(0, keepdim=True)])
    return {"mass": iou(attention_mass_mask(maps, mass), target), "area": iou(topk_mask(maps, count), target)}


def mass_curve(maps: Tensor, target: PatchCounts) -> Tensor:
    """Compute the IoUs (19, maps) of maps (maps, rows, columns) for masks with .05, .10, ..., .95 of the attention."""
    return torch.stack([iou(attention_mass_mask(maps, mass), target) for mass in THRESHOLDS.tolist()])


def choose_heads(scores: Tensor, seed: int) -> tuple[Tensor, list[int]]:
    """Choose the fixed head for each image (n,) int64 by the scores (n, heads) of other images, for n > 1.

    The images are split at random into two halves; the head with the best mean score on either half is used for the
    other one.

    Returns:
        The head of each image, and the two heads that were chosen.
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

    Its IoU is near the largest that patches can have, but not always the largest: an object that fills no patch by
    half has none.
    """
    return target.foreground > target.valid / 2


def downsample_mask(mask: Tensor) -> Tensor:
    """Resize masks (..., H, W) bool to a square of (..., 64, 64) for the center prior."""
    return upsample_mask(mask, (PRIOR_SIDE, PRIOR_SIDE))


def center_prior(masks: Tensor) -> tuple[Tensor, float]:
    """Compute the IoU (n,) of the dataset-average mask: what the positions of objects alone are worth.

    Each image is scored against the average of the other images' masks (n, 64, 64) bool. The threshold is the best
    of .05, .10, ..., .95 on these very images, which favors this baseline.

    Args:
        masks: Of at least two images, resized to a square; IoU does not change with the aspect.

    Returns:
        The IoU of each image, and the threshold.
    """
    total = masks.sum(0)  # (64, 64)
    curves = torch.stack([_iou_by_threshold((total - own.long()) / (len(masks) - 1), own) for own in masks])
    best = int(curves.mean(0).argmax())
    return curves[:, best], THRESHOLDS[best].item()


def _iou_by_threshold(average: Tensor, own: Tensor) -> Tensor:
    masks = average >= THRESHOLDS[:, None, None]  # (thresholds, 64, 64)
    return (masks & own).sum((-2, -1)).double() / (masks | own).sum((-2, -1)).clamp(min=1)


def largest_box(mask: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Return the box (4,) in pixels around the largest part of a mask of patches (rows, columns) bool; None if empty.

    Args:
        mask: Its parts are connected by sides of patches.
        size: Height and width of the image.
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
