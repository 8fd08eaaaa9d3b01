"""Boxes around masks and how they overlap: whether a picture's object is located (CorLoc)."""

from __future__ import annotations

import torch
from scipy import ndimage
from torch import Tensor

from ssl_vit.attention.masks import patch_of_pixel

LOCATED = 0.5  # least IoU with any given box (Deselaers et al. 2010)


def component_boxes(mask: Tensor) -> Tensor:
    """Boxes (n, 4) int64 around the parts of a mask (H, W) bool that touch by their sides, the largest part first.

    A box is left, top, right, bottom in pixels; right and bottom are the first ones outside.
    """
    labels, count = ndimage.label(mask.numpy())
    if not count:
        return torch.zeros(0, 4, dtype=torch.int64)
    sizes = torch.bincount(torch.from_numpy(labels).flatten().long(), minlength=count + 1)[1:]
    boxes = [[columns.start, rows.start, columns.stop, rows.stop] for rows, columns in ndimage.find_objects(labels)]
    return torch.tensor(boxes)[sizes.argsort(descending=True, stable=True)]


def largest_box(mask: Tensor, size: tuple[int, int]) -> Tensor | None:
    """The box (4,) in pixels around the largest part of a mask of patches (rows, columns) bool; None for an empty one.

    Args:
        mask: Its parts are those of patches that touch by their sides.
        size: Height and width of the picture.
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


def located(mask: Tensor, boxes: Tensor, size: tuple[int, int]) -> bool:
    """Whether the box of a mask's largest part (rows, columns) has an IoU of at least .5 with any given box (n, 4)."""
    box = largest_box(mask, size)
    return box is not None and bool((box_iou(box, boxes) >= LOCATED).any())
