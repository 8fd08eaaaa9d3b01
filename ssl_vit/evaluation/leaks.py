"""Test pictures that stand among the training pictures: they flatter every score."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ssl_vit.data.copies import identical
from ssl_vit.data.find import LabelledSplit
from ssl_vit.evaluation.knn import NEAR_DUPLICATE, Found
from ssl_vit.evaluation.study import Source

_NAMED = 8  # pairs that the record names


class Leak(NamedTuple):
    """Test pictures that are the same as a training picture; in a single set, as another picture."""

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
        where = "another picture" if self.one_set else "a training picture"
        text = f"{self.near:,} test pictures are nearly the same as {where} (cosine > {NEAR_DUPLICATE})"
        if self.files:
            text += f", {self.files:,} of them byte for byte: {' = '.join(self.names[0])}, for one"
        return [text]


def find_leak(source: Source, found: Found, pictures: LabelledSplit) -> Leak:
    """Look for copies among the neighbours that a search has found.

    What is stored alike has the same features but for rounding, so that only near duplicates are read again.
    """
    pairs = found.near_duplicates().cpu()  # (P, 2)
    asked = source.train if source.test is None else source.test
    test = pictures.train if pictures.test is None else pictures.test
    places = torch.stack([asked.index[pairs[:, 0]], source.train.index[pairs[:, 1]]], dim=1)
    same = identical(test, pictures.train, places)
    copies = dict(reversed(same.tolist()))  # of each picture its nearest copy
    return Leak(
        near=len(torch.unique(pairs[:, 0])),
        files=len(copies),
        names=[(test.name(a), pictures.train.name(copies[a])) for a in sorted(copies)[:_NAMED]],
        one_set=source.test is None,
    )
