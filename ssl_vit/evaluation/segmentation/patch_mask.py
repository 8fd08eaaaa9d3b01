"""Masks of patches found without labels: score map, mask, and helpers of the methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy import ndimage
from torch import Tensor

from ssl_vit.models.attention_maps import LastBlockFeatures


class Segmentation(NamedTuple):
    """Foreground of an image, patch by patch."""

    score_map: Tensor  # (rows, columns) float32; higher is foreground, above 0 before connected parts are selected
    mask: Tensor  # (rows, columns) bool


Segmenter = Callable[[LastBlockFeatures], Segmentation]


def concatenated_keys(features: LastBlockFeatures) -> Tensor:
    """Return the keys (N, heads · d) of an image's patches, row by row, the heads side by side."""
    heads, rows, columns, width = features.keys.shape
    return features.keys.permute(1, 2, 0, 3).reshape(rows * columns, heads * width)


def connected_component(mask: Tensor, seed: int) -> Tensor:
    """Return the part of a mask (rows, columns) bool that is connected with a seed by sides of patches.

    Args:
        mask: (rows, columns) bool.
        seed: Index of a patch, row by row; the result is empty if it is not in the mask.

    Example:
        >>> connected_component(torch.tensor([[True, True, False], [False, False, True]]), 1)
        tensor([[ True,  True, False],
                [False, False, False]])
    """
    labels = torch.from_numpy(ndimage.label(mask.numpy())[0])
    return mask & (labels == labels.flatten()[seed])


def empty_segmentation(features: LastBlockFeatures) -> Segmentation:
    """Return a segmentation without foreground."""
    scores = torch.zeros(features.keys.shape[1:3])
    return Segmentation(scores, scores > 0)
