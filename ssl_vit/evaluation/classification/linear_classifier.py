"""What linear classifiers of frozen features share: which features, standardized how, held out for whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.evaluation.classification.knn import rank_of_true_class
from ssl_vit.evaluation.features.extractor import Features

_ROWS = 4096  # of features that are standardized at a time
_NOISE = 1e-6  # of a feature's size: a standard deviation below it is of rounding errors only

TEST_SHARE = 0.2  # of each class that is held out to test on, where there is but one dataset


class FeatureVariant(NamedTuple):
    """Which of the features a probe sees."""

    blocks: int  # [CLS] of so many last blocks, concatenated
    patch_mean: bool  # and the mean patch token of the last one

    def of(self, features: Features) -> Tensor:
        """The chosen features (N, D') float32."""
        cls = features.cls[:, -self.blocks :].flatten(1)
        chosen = torch.cat([cls, features.patch_mean], dim=1) if self.patch_mean else cls
        return chosen.float()

    def columns(self, widest: FeatureVariant, features: Features) -> slice:
        """Where the chosen features stand among those of a variant that holds all of them."""
        width = features.cls.shape[2]
        start, stop = (widest.blocks - self.blocks) * width, widest.blocks * width
        return slice(start, stop + features.patch_mean.shape[1] if self.patch_mean else stop)

    def __str__(self) -> str:
        blocks = "last block" if self.blocks == 1 else f"last {self.blocks} blocks"
        return f"[CLS] of the {blocks}{' + patch mean' if self.patch_mean else ''}"


class Standardizer(NamedTuple):
    """How features are standardized: (x - mean) · scale."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,): 1 / standard deviation; 0 where a feature is constant

    @classmethod
    def of(cls, features: Tensor) -> Standardizer:
        """Mean and standard deviation of features (N, D), in float64; rounding errors count as constant."""
        total, squares = (features.new_zeros(features.shape[1], dtype=torch.float64) for _ in range(2))
        for rows in torch.split(features, _ROWS):
            total += rows.double().sum(dim=0)
        mean = total / len(features)
        for rows in torch.split(features, _ROWS):
            squares += (rows.double() - mean).square_().sum(dim=0)
        std = (squares / len(features)).sqrt()
        return cls(mean, torch.where(std > _NOISE * mean.abs(), 1 / std, 0))

    def to(self, dtype: torch.dtype) -> Standardizer:
        """The same in another precision."""
        return Standardizer(self.mean.to(dtype), self.scale.to(dtype))

    def apply(self, features: Tensor) -> Tensor:
        """Standardized features (N, D)."""
        return (features - self.mean) * self.scale

    def rows(self, features: Tensor) -> Iterator[Tensor]:
        """Standardized features (N, D) in the precision of mean and scale, some thousand rows at a time."""
        return (self.apply(rows.to(self.mean.dtype)) for rows in torch.split(features, _ROWS))


class LinearClassifier(NamedTuple):
    """A linear classifier of standardized features."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,): 1 / standard deviation; 0 where a feature is constant
    weight: Tensor  # (D, C)
    bias: Tensor  # (C,)

    def logits(self, features: Tensor) -> Tensor:
        """Scores (N, C) of features (N, D)."""
        return Standardizer(self.mean, self.scale).apply(features) @ self.weight + self.bias


def split_rule(test: object | None, seed: int) -> str:
    """What is tested on, in words: the test images if there are any, else a share of the training images."""
    return f"{TEST_SHARE:g} of each class held out to test, seed {seed}" if test is None else "train and test"


def stratified(labels: Tensor, share: float, *, seed: int) -> Tensor:
    """A random share of each class as a mask (N,) bool: at least one image and never all; none of a single one."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


def label_ranks(logits: Tensor, classes: Tensor, truth: Tensor) -> Tensor:
    """Ranks (Q,) of the true labels by scores (Q, C) of `classes` (C,), ascending; one that is none of them is last."""
    known = torch.isin(truth, classes)
    ranks = torch.full_like(truth, len(classes))
    ranks[known] = rank_of_true_class(torch.searchsorted(classes, truth[known]), logits[known])
    return ranks
