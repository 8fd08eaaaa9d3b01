"""Test images that are also among the training images: they inflate every score."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ssl_vit.data.dataset import exact_duplicates
from ssl_vit.data.dataset_factory import TrainTestSplit
from ssl_vit.evaluation.classification.knn import NEAR_DUPLICATE, NeighborResult
from ssl_vit.evaluation.evaluator import FeatureSource
from ssl_vit.runtime.text import pluralize

_MAX_PAIRS = 8  # named in the result


class TrainTestOverlap(NamedTuple):
    """Test images that equal a training image, or with leave-one-out another image."""

    near: int  # by their features: a cosine above NEAR_DUPLICATE
    files: int  # of them, those with identical bytes
    names: list[tuple[str, str]]  # the first of these, each with its duplicate
    leave_one_out: bool

    def data_info(self) -> dict[str, Any]:
        """Return the counts for the result."""
        return {"near_duplicates": self.near, "identical_files": {"count": self.files, "names": self.names}}

    def warnings(self) -> list[str]:
        """Return a warning if there is an overlap."""
        if not self.near:
            return []
        other = "another image" if self.leave_one_out else "a training image"
        text = f"{pluralize(self.near, 'test image')} nearly equal to {other} (cosine > {NEAR_DUPLICATE})"
        if self.files:
            text += f", {self.files:,} of them byte for byte, for example {' = '.join(self.names[0])}"
        return [text]


def find_overlap(source: FeatureSource, found: NeighborResult, split: TrainTestSplit) -> TrainTestOverlap:
    """Find duplicates among the neighbors of a search.

    Identical files have the same features up to rounding, so that only the files of near duplicates are compared.
    """
    pairs = found.near_duplicates().cpu()  # (P, 2)
    queries = source.train if source.test is None else source.test
    test = split.train if split.test is None else split.test
    indices = torch.stack([queries.index[pairs[:, 0]], source.train.index[pairs[:, 1]]], dim=1)
    same = exact_duplicates(test, split.train, indices)
    duplicates = dict(reversed(same.tolist()))  # of each image its nearest duplicate
    return TrainTestOverlap(
        near=len(torch.unique(pairs[:, 0])),
        files=len(duplicates),
        names=[(test.name(a), split.train.name(duplicates[a])) for a in sorted(duplicates)[:_MAX_PAIRS]],
        leave_one_out=source.test is None,
    )
