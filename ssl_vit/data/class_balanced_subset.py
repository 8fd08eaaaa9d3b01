"""An order of labeled images whose every prefix is class-balanced, as far as the classes have images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassBalancedOrder(NamedTuple):
    """M labeled images: the first of each class, then the second of each class, and so on."""

    indices: Tensor  # (M,) int64
    rank: Tensor  # (M,) int64, ascending: the number of earlier images of the same class
    class_size: Tensor  # (M,) int64: the number of images of the same class


def class_balanced_order(labels: Tensor, *, seed: int) -> ClassBalancedOrder:
    """Order the images with labels (N,) >= 0: random within each class, and random classes within each rank.

    Example:
        >>> labels = torch.tensor([7, 7, 7, 7, 3, 3, -1])
        >>> order = class_balanced_order(labels, seed=0)
        >>> labels[order.indices].bincount(minlength=8)[[3, 7]].tolist()
        [2, 4]
        >>> order.rank.tolist()
        [0, 0, 1, 1, 2, 3]
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order] >= 0]
    _, classes, sizes = torch.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = classes.argsort(stable=True)  # indices into `order`
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[classes[by_class]]
    by_rank = rank.argsort(stable=True)
    return ClassBalancedOrder(order[by_rank], rank[by_rank], sizes[classes][by_rank])
