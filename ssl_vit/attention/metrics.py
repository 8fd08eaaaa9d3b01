"""IoU of attention masks with given object masks, by every head rule, beside what needs no learning.

All IoUs are those at the picture's own size. A mask of patches is constant within each patch, so that the object's
pixels need to be counted once per patch and no mask has to be enlarged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.attention.masks import mass_mask, patch_of_pixel, to_pixels, top_mask

OUTLINE = 64  # a dataset-average mask has this many cells a side
THRESHOLDS = torch.arange(1, 20, dtype=torch.float64) / 20


class Truth(NamedTuple):
    """A given object mask, counted over the patches of a grid."""

    object: Tensor  # (rows, columns) float64: pixels of the object within each patch
    pixels: Tensor  # (rows, columns) float64: all pixels within each patch, void ones left out


def count_truth(mask: Tensor, grid: tuple[int, int], counted: Tensor | None = None) -> Truth:
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
    return Truth(inside.view(grid), pixels.view(grid))


def iou(masks: Tensor, truth: Truth) -> Tensor:
    """Intersection over union (...) of masks of patches (..., rows, columns) with the object, in pixels."""
    inside = (masks * truth.object).sum((-2, -1))
    return inside / ((masks * truth.pixels).sum((-2, -1)) + truth.object.sum() - inside).clamp(min=1)


class HeadScores(NamedTuple):
    """IoUs of one or more pictures."""

    heads: Tensor  # (..., heads): the mask of each head
    mean: Tensor  # (...): the mask of the heads' mean map


class Scores(NamedTuple):
    """The IoUs of one network's maps by both threshold rules."""

    mass: HeadScores  # the fewest patches with a share of the attention
    area: HeadScores  # as many patches as the object has: knows the object's size, so it is no prediction


def score(maps: Tensor, truth: Truth, mass: float) -> Scores:
    """IoUs of one picture's maps (heads, rows, columns)."""
    share = truth.object.sum() / truth.pixels.sum()
    count = max(1, round(share.item() * truth.object.numel()))
    maps = torch.cat([maps, maps.mean(0, keepdim=True)])
    by_mass, by_area = iou(mass_mask(maps, mass), truth), iou(top_mask(maps, count), truth)
    return Scores(HeadScores(by_mass[:-1], by_mass[-1]), HeadScores(by_area[:-1], by_area[-1]))


def stack_scores(pictures: list[Scores]) -> Scores:
    """The scores of n pictures as one: (n, heads) and (n,)."""
    rules = zip(*pictures, strict=True)
    return Scores(*(HeadScores(*map(torch.stack, zip(*rule, strict=True))) for rule in rules))


def oracle_head(scores: HeadScores) -> Tensor:
    """IoU (n,) of each picture's best head: an upper bound that grows with the number of heads."""
    return scores.heads.amax(-1)


def mass_curve(maps: Tensor, truth: Truth) -> Tensor:
    """IoUs (19, maps) of one picture's maps (maps, rows, columns), holding .05, .10, ..., .95 of the attention."""
    return torch.stack([iou(mass_mask(maps, mass), truth) for mass in THRESHOLDS.tolist()])


def fixed_head(scores: HeadScores, seed: int) -> tuple[Tensor, list[int]]:
    """IoU (n,) of one head for all pictures, chosen on other pictures than it is scored on.

    Args:
        scores: Of at least two pictures.
        seed: Of the split.

    Returns:
        The IoU of each picture, and the two heads that were chosen.
    """
    heads, chosen = choose_heads(scores.heads, seed)
    return scores.heads.gather(1, heads[:, None])[:, 0], chosen


def choose_heads(scores: Tensor, seed: int) -> tuple[Tensor, list[int]]:
    """The fixed head for each picture (n,) int64, by the scores (n, heads) of other pictures.

    The pictures are split at random into two halves; the head with the best mean score on either half serves the
    other one.

    Returns:
        The head of each picture, and the two heads that were chosen.
    """
    count = len(scores)
    first = torch.zeros(count, dtype=torch.bool)
    first[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 2]] = True
    chosen = [int(scores[half].mean(0).argmax()) for half in (first, ~first)]
    return torch.where(first, chosen[1], chosen[0]), chosen


def majority(truth: Truth) -> Tensor:
    """Every patch that is mostly object (rows, columns) bool: no mask of patches has more pixels right.

    Its IoU is near the largest that patches can have, but not always the largest: an object that fills no patch by
    half has none.
    """
    return truth.object > truth.pixels / 2


def outline(mask: Tensor) -> Tensor:
    """Masks (..., H, W) bool, squashed to (..., 64, 64) bool: all that the centre prior keeps of a picture."""
    return to_pixels(mask, (OUTLINE, OUTLINE))


def centre_prior(outlines: Tensor) -> tuple[Tensor, float]:
    """IoU (n,) of the dataset-average mask: what the objects' places alone are worth.

    Each picture is scored against the average of the other pictures' masks (n, 64, 64) bool. The threshold is the best
    of .05, .10, ..., .95 on these very pictures, which flatters this baseline.

    Args:
        outlines: Of at least two pictures, squashed to a square; IoU does not change with the squashing.

    Returns:
        The IoU of each picture, and the threshold.
    """
    total = outlines.sum(0)  # (64, 64)
    curves = torch.stack([_iou_by_threshold((total - own.long()) / (len(outlines) - 1), own) for own in outlines])
    best = int(curves.mean(0).argmax())
    return curves[:, best], THRESHOLDS[best].item()


def _iou_by_threshold(average: Tensor, own: Tensor) -> Tensor:
    masks = average >= THRESHOLDS[:, None, None]  # (thresholds, 64, 64)
    return (masks & own).sum((-2, -1)).double() / (masks | own).sum((-2, -1)).clamp(min=1)
