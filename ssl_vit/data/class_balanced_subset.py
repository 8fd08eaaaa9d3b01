"""An order of labeled images of which every beginning holds as many of each class as there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassBalancedOrder(NamedTuple):
    """M labeled images, one of each class by turns."""

    place: Tensor  # (M,) int64, among all images
    turn: Tensor  # (M,) int64, ascending: how many of its class come before it
    size: Tensor  # (M,) int64: how many its class has


def class_balanced_order(labels: Tensor, *, seed: int) -> ClassBalancedOrder:
    """The images with a label (N,) of 0 and more: at random within a class, and the classes at random within a turn.

    Example:
        >>> order = by_turns(torch.tensor([7, 7, 7, 7, 3, 3, -1]), seed=0)
        >>> torch.tensor([7, 7, 7, 7, 3, 3, -1])[order.place].bincount(minlength=8)[[3, 7]].tolist()
        [2, 4]
        >>> order.turn.tolist()
        [0, 0, 1, 1, 2, 3]
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order] >= 0]
    _, classes, sizes = torch.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = classes.argsort(stable=True)  # places in `order`
    turn = torch.empty_like(order)
    turn[by_class] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[classes[by_class]]
    turns = turn.argsort(stable=True)
    return ClassBalancedOrder(order[turns], turn[turns], sizes[classes][turns])
