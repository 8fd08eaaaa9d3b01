"""Test images that stand among the training images: they flatter every score."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ssl_vit.data.dataset_factory import TrainTestSplit
from ssl_vit.data.duplicates import exact_duplicates
from ssl_vit.evaluation.classification.knn import NEAR_DUPLICATE, NeighborResult
from ssl_vit.evaluation.evaluator import FeatureSource

_NAMED = 8  # pairs that the record names


class TrainTestOverlap(NamedTuple):
    """Test images that are the same as a training image; in a single set, as another image."""

    near: int  # by their features: a cosine above NEAR_DUPLICATE
    files: int  # those of them that are stored byte for byte alike
    names: list[tuple[str, str]]  # the first of these, each with what it is the same as
    one_set: bool

    def findings(self) -> dict[str, Any]:
        """For the record."""
        return {"near_duplicates": self.near, "identical_files": {"count": self.files, "names": self.names}}

    def warnings(self) -> list[str]:
        """For the reader of the scores."""
        if not self.near:
            return []
        where = "another image" if self.one_set else "a training image"
        text = f"{self.near:,} test images are nearly the same as {where} (cosine > {NEAR_DUPLICATE})"
        if self.files:
            text += f", {self.files:,} of them byte for byte: {' = '.join(self.names[0])}, for one"
        return [text]


def find_overlap(source: FeatureSource, found: NeighborResult, dataset: TrainTestSplit) -> TrainTestOverlap:
    """Look for copies among the neighbors that a search has found.

    What is stored alike has the same features but for rounding, so that only near duplicates are read again.
    """
    pairs = found.near_duplicates().cpu()  # (P, 2)
    asked = source.train if source.test is None else source.test
    test = dataset.train if dataset.test is None else dataset.test
    places = torch.stack([asked.index[pairs[:, 0]], source.train.index[pairs[:, 1]]], dim=1)
    same = exact_duplicates(test, dataset.train, places)
    copies = dict(reversed(same.tolist()))  # of each image its nearest copy
    return TrainTestOverlap(
        near=len(torch.unique(pairs[:, 0])),
        files=len(copies),
        names=[(test.name(a), dataset.train.name(copies[a])) for a in sorted(copies)[:_NAMED]],
        one_set=source.test is None,
    )
