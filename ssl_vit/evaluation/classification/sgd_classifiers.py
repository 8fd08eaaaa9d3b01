"""A grid of linear classifiers trained simultaneously by SGD, on the same batches of cached features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.evaluation.classification.linear_classifier import LinearClassifier, Standardizer
from ssl_vit.runtime.device import upcast
from ssl_vit.runtime.progress import progress_bar

MOMENTUM = 0.9


class Schedule(NamedTuple):
    """The batches of the training."""

    epochs: int  # passes over the images, each in a new order
    batch_size: int  # maximum; the batches of an epoch differ by at most one image
    seed: int  # of the orders


class Head(NamedTuple):
    """One linear classifier of the grid."""

    columns: slice  # of the features
    lr: float  # initial value; decays to 0 along half a cosine
    weight_decay: float  # of the weights, not of the bias


def train_heads(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    heads: Sequence[Head],
    schedule: Schedule,
    mask: Tensor | None = None,
) -> list[LinearClassifier]:
    """Train all heads by SGD with momentum on mean cross-entropy, from zero, on standardized features.

    Each head gets the weights that it would get alone: the gradients of the summed losses are independent, and neither
    a large learning rate nor its NaN reaches another head. Consecutive heads with the same columns share a matrix.

    Features are (N, D) of any floating dtype, labels (N,) int64 in [0, classes). The mask (N,) selects the images to
    train on, by default all; the standardization uses all.
    """
    dtype = upcast(features).dtype
    standard = Standardizer.of(features).to(dtype)
    groups = [
        _HeadGroup(list(group), features.new_zeros(0, dtype=dtype), dim=features.shape[1], classes=classes)
        for _, group in groupby(heads, key=lambda head: (head.columns.start, head.columns.stop))
    ]
    widths = [len(group.bias) for group in groups]
    train = torch.arange(len(features)) if mask is None else mask.nonzero().squeeze(1).cpu()
    batches = math.ceil(len(train) / schedule.batch_size)
    steps = schedule.epochs * batches
    generator = torch.Generator().manual_seed(schedule.seed)
    for epoch in progress_bar(range(schedule.epochs), desc=f"{len(heads)} heads", unit=" epochs"):
        order = train[torch.randperm(len(train), generator=generator)].to(features.device)
        for step, indices in enumerate(order.tensor_split(batches), start=epoch * batches):
            x = standard.apply(features[indices].to(dtype))  # (B, D)
            logits = torch.cat([group.logits(x) for group in groups], dim=1)
            errors = _logit_gradients(logits, labels[indices], len(heads), classes)
            for group, error in zip(groups, torch.split(errors, widths, dim=1), strict=True):
                group.step(x, error, (1 + math.cos(math.pi * step / steps)) / 2)
    return [probe for group in groups for probe in group.probes(standard, classes)]


class _HeadGroup:
    """H heads with the same columns: their weights side by side in one matrix, with dtype and device of `like`."""

    def __init__(self, heads: Sequence[Head], like: Tensor, *, dim: int, classes: int) -> None:
        self.columns = heads[0].columns
        width, total = len(range(*self.columns.indices(dim))), len(heads) * classes
        self.weight, self.weight_velocity = (like.new_zeros(width, total) for _ in range(2))  # (D', H·C)
        self.bias, self.bias_velocity = (like.new_zeros(total) for _ in range(2))  # (H·C,)
        self.lr = like.new_tensor([head.lr for head in heads]).repeat_interleave(classes)  # (H·C,)
        self.decay = like.new_tensor([head.weight_decay for head in heads]).repeat_interleave(classes)  # (H·C,)

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits (B, H·C) of features (B, D)."""
        return torch.addmm(self.bias, x[:, self.columns], self.weight)

    def step(self, x: Tensor, error: Tensor, anneal: float) -> None:
        """Take one step of SGD as in `torch.optim.SGD`, from the gradient `error` (B, H·C) of the logits."""
        gradient = (x[:, self.columns].T @ error).addcmul_(self.weight, self.decay)
        self.weight_velocity.mul_(MOMENTUM).add_(gradient)
        self.bias_velocity.mul_(MOMENTUM).add_(error.sum(dim=0))
        lr = anneal * self.lr
        self.weight.addcmul_(self.weight_velocity, lr, value=-1)
        self.bias.addcmul_(self.bias_velocity, lr, value=-1)

    def probes(self, standard: Standardizer, classes: int) -> list[LinearClassifier]:
        """Return the classifier of each head."""
        mean, scale = (part[self.columns] for part in standard)
        parts = zip(torch.split(self.weight, classes, dim=1), torch.split(self.bias, classes), strict=True)
        return [LinearClassifier(mean, scale, weight.contiguous(), bias) for weight, bias in parts]


def _logit_gradients(logits: Tensor, labels: Tensor, heads: int, classes: int) -> Tensor:
    """Compute the gradients (B, H·C) of every head's mean cross-entropy with respect to its logits."""
    errors = logits.view(-1, heads, classes).softmax(dim=2)
    errors[torch.arange(len(labels), device=labels.device), :, labels] -= 1
    return errors.view_as(logits).div_(len(labels))
