"""Linear classifiers on frozen features: choice and standardization of features, stratified splits, their file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from ssl_vit.evaluation.classification.knn import UNRANKED, rank_of_true_class
from ssl_vit.evaluation.evaluator import Evaluation
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.runtime.atomic_io import atomic_write, write_json

_ROWS = 4096  # of features that are standardized at a time
_NOISE = 1e-6  # times a feature's mean: smaller standard deviations are rounding errors

TEST_SHARE = 0.2  # fraction of each class in the test split, if there is only one dataset


class FeatureVariant(NamedTuple):
    """A choice of features."""

    blocks: int  # number of last blocks whose [CLS] tokens are concatenated
    patch_mean: bool  # whether the mean patch token of the last block is appended

    def of(self, features: Features) -> Tensor:
        """Return the features of this variant (N, D') float32."""
        cls = features.cls[:, -self.blocks :].flatten(1)
        chosen = torch.cat([cls, features.patch_mean], dim=1) if self.patch_mean else cls
        return chosen.float()

    def columns(self, widest: FeatureVariant, features: Features) -> slice:
        """Return the columns of this variant within a variant that contains it."""
        width = features.cls.shape[2]
        start, stop = (widest.blocks - self.blocks) * width, widest.blocks * width
        return slice(start, stop + features.patch_mean.shape[1] if self.patch_mean else stop)

    def __str__(self) -> str:
        blocks = "last block" if self.blocks == 1 else f"last {self.blocks} blocks"
        return f"[CLS] of the {blocks}{' + patch mean' if self.patch_mean else ''}"


class Standardizer(NamedTuple):
    """Standardization of features: (x - mean) · scale."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,): 1 / standard deviation; 0 where a feature is constant

    @classmethod
    def of(cls, features: Tensor) -> Standardizer:
        """Compute mean and standard deviation of features (N, D), in float64; rounding errors count as constant."""
        total, squares = (features.new_zeros(features.shape[1], dtype=torch.float64) for _ in range(2))
        for rows in torch.split(features, _ROWS):
            total += rows.double().sum(dim=0)
        mean = total / len(features)
        for rows in torch.split(features, _ROWS):
            squares += (rows.double() - mean).square_().sum(dim=0)
        std = (squares / len(features)).sqrt()
        return cls(mean, torch.where(std > _NOISE * mean.abs(), 1 / std, 0))

    def to(self, dtype: torch.dtype) -> Standardizer:
        """Convert to another dtype."""
        return Standardizer(self.mean.to(dtype), self.scale.to(dtype))

    def apply(self, features: Tensor) -> Tensor:
        """Standardize features (N, D)."""
        return (features - self.mean) * self.scale

    def rows(self, features: Tensor) -> Iterator[Tensor]:
        """Yield standardized features (N, D) in the dtype of mean and scale, in chunks of rows."""
        return (self.apply(rows.to(self.mean.dtype)) for rows in torch.split(features, _ROWS))


class LinearClassifier(NamedTuple):
    """Linear classifier on standardized features."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,): 1 / standard deviation; 0 where a feature is constant
    weight: Tensor  # (D, C)
    bias: Tensor  # (C,)

    def logits(self, features: Tensor) -> Tensor:
        """Compute the scores (N, C) of features (N, D)."""
        return Standardizer(self.mean, self.scale).apply(features) @ self.weight + self.bias


def split_rule(test: object | None, seed: int) -> str:
    """Describe the split: train and test images, or else a fraction of each class as test images."""
    return f"{TEST_SHARE:g} of each class held out as test images, seed {seed}" if test is None else "train and test"


def stratified(labels: Tensor, fraction: float, *, seed: int) -> Tensor:
    """Draw a random fraction of each class as a mask (N,) bool: at least one image of a class, but not the last."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


def label_ranks(logits: Tensor, classes: Tensor, target: Tensor) -> Tensor:
    """Return the ranks (Q,) of target labels by scores (Q, C) of ascending `classes` (C,), else UNRANKED."""
    trained = torch.isin(target, classes)
    ranks = torch.full_like(target, UNRANKED)
    ranks[trained] = rank_of_true_class(torch.searchsorted(classes, target[trained]), logits[trained])
    return ranks


def save_probe(
    evaluation: Evaluation, probe: LinearClassifier, variant: FeatureVariant, classes: Sequence[str]
) -> Path:
    """Write a classifier on the CPU to `<result>.probe.safetensors`, and beside it a JSON that says how to apply it.

    The file holds mean and scale (D,), weight (D, C) and bias (C,), float32, with `classes` in the order of the scores.
    """
    path = evaluation.out.with_suffix(".probe.safetensors")
    with atomic_write(path) as file:
        file.write(save({name: part.contiguous() for name, part in probe._asdict().items()}))
    checkpoint = f"{evaluation.config.checkpoint!r}, {evaluation.config.weights!r}"
    patch_mean = " + [tokens[-1].patches.mean(dim=1)]" if variant.patch_mean else ""
    description = {
        "apply": [
            "import torch",
            "from safetensors.torch import load_file",
            "from ssl_vit.models.checkpoint import load_backbone",
            f"tokens = load_backbone({checkpoint}).backbone.get_intermediate_tokens(images, {variant.blocks})",
            f"x = torch.cat([block.cls for block in tokens]{patch_mean}, dim=1)",
            f"probe = load_file({path.name!r})",
            'scores = (x - probe["mean"]) * probe["scale"] @ probe["weight"] + probe["bias"]',
        ],
        "images": "float (B, channels, image_size, image_size), cropped and normalized as in `transform`",
        "transform": evaluation.transform.describe(),
        "features": str(variant),
        "classes": list(classes),
        "checkpoint": {"source": evaluation.loaded.source, "sha256": evaluation.loaded.sha256},
    }
    write_json(path.with_suffix(".json"), description)
    return path
