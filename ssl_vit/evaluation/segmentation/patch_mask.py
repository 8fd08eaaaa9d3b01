"""What a method without labels says about an image: how much of an object each patch is, and a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy import ndimage
from torch import Tensor

from ssl_vit.models.attention_maps import LastBlockFeatures


class Segmentation(NamedTuple):
    """One object against the rest of an image, patch by patch."""

    soft: Tensor  # (rows, columns) float32; higher is more object, above zero is object before components are chosen
    mask: Tensor  # (rows, columns) bool


Segmenter = Callable[[LastBlockFeatures], Segmentation]


def concatenated_keys(sight: LastBlockFeatures) -> Tensor:
    """The keys (N, heads · d) of an image's patches, row by row, the heads side by side."""
    heads, rows, columns, width = sight.keys.shape
    return sight.keys.permute(1, 2, 0, 3).reshape(rows * columns, heads * width)


def component_with(mask: Tensor, seed: int) -> Tensor:
    """The patches (rows, columns) bool of a mask that touch a seed by their sides, directly or through others.

    Args:
        mask: (rows, columns) bool.
        seed: Number of a patch, row by row; where it is no part of the mask, nothing is left.

    >>> component_with(torch.tensor([[True, True, False], [False, False, True]]), 1)
    tensor([[ True,  True, False],
            [False, False, False]])
    """
    labels = torch.from_numpy(ndimage.label(mask.numpy())[0])
    return mask & (labels == labels.flatten()[seed])


def empty(sight: LastBlockFeatures) -> Segmentation:
    """That there is no object."""
    soft = torch.zeros(sight.keys.shape[1:3])
    return Segmentation(soft, soft > 0)
