"""Exact kNN classification of frozen features: one search at the largest k serves every k and temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.dataset import evenly_spaced, exact_duplicates
from ssl_vit.data.dataset_factory import TrainTestSplit
from ssl_vit.evaluation.classification.nearest_neighbors import EngineChoice, Neighbors, choose_engine, exact_search
from ssl_vit.evaluation.evaluator import FeatureSource
from ssl_vit.runtime.text import pluralize

NEAR_DUPLICATE = 0.9999  # cosine above which two images count as the same
_VOTES = 1 << 24  # entries of a block of votes: 64 MB
_MAX_NAMES = 8  # of identical files in a result
_COMPARED = 1000  # test images that are compared with all training images where no kNN is computed
UNRANKED = 1 << 31  # rank of a true class that has no score: it is never among the first n


class LabeledFeatures(NamedTuple):
    """Features of N images and their labels."""

    features: Tensor  # (N, D) float
    labels: Tensor  # (N,) int64, any numbers


class NeighborResult(NamedTuple):
    """The nearest training images of Q queries, with the labels that they vote for."""

    similarity: Tensor  # (Q, k) float32: cosine, the largest first
    indices: Tensor  # (Q, k) int64, of training images
    train_labels: Tensor  # (N,) int64
    target: Tensor  # (Q,) int64: labels of the queries
    available: int  # number of possible neighbors: N, or N - 1 with leave-one-out

    def near_duplicates(self) -> Tensor:
        """Return pairs (P, 2) of a query and a training image whose cosine is above NEAR_DUPLICATE."""
        query, column = (self.similarity > NEAR_DUPLICATE).nonzero(as_tuple=True)
        return torch.stack([query, self.indices[query, column]], dim=1)

    @property
    def leave_one_out(self) -> bool:
        """Whether the queries are the training images themselves, and do not vote for themselves."""
        return self.available < len(self.train_labels)

    def voters(self) -> Tensor:
        """Count the possible voters (C,) of each training class for an image of that class."""
        counts: Tensor = torch.unique(self.train_labels, return_counts=True)[1]
        return counts - int(self.leave_one_out)

    def smallest_class(self) -> int:
        """Return the smallest positive number of voters of a class, or 0: with a larger k other classes vote, too."""
        voters = self.voters()
        return int(voters[voters > 0].min()) if voters.any() else 0


class KNNResult(NamedTuple):
    """The classification of Q queries, for each k."""

    ranks: dict[int, Tensor]  # (Q,) int64: number of classes before the true one; 0 is right; UNRANKED without a vote
    predicted: dict[int, Tensor]  # (Q,) int64: the label with most votes; among equals the lowest
    k_effective: dict[int, int]  # number of neighbors that voted: k, or all that are available
    warnings: list[str]


def knn(
    train: LabeledFeatures,
    queries: LabeledFeatures | None,
    *,
    ks: Sequence[int],
    temperature: float,
    engine: EngineChoice = "auto",
) -> KNNResult:
    """Classify queries by the votes of their k nearest training images (Wu et al. 2018; DINO's `eval_knn.py`).

    Neighbors are those of largest cosine s, and each votes exp(s / temperature) for its class. Without queries each
    training image is classified by the others (leave-one-out).
    """
    return classify(search(train, queries, max_k=max(ks), engine=engine), ks=ks, temperature=temperature)


def search(
    train: LabeledFeatures, queries: LabeledFeatures | None, *, max_k: int, engine: EngineChoice = "auto"
) -> NeighborResult:
    """Find the `max_k` nearest training images of each query, or all; without queries, of each training image."""
    features = F.normalize(train.features.float(), dim=1)
    if queries is None:
        available = len(features) - 1
        vectors, exclude = features, torch.arange(len(features), device=features.device)
    else:
        available = len(features)
        vectors, exclude = F.normalize(queries.features.float(), dim=1), None
    chosen = choose_engine(engine, features.device)
    found = exact_search(vectors, features, k=min(max_k, available), exclude=exclude, engine=chosen)
    return NeighborResult(*found, train.labels, (train if queries is None else queries).labels, available)


def classify(found: NeighborResult, *, ks: Sequence[int], temperature: float) -> KNNResult:
    """Classify by the votes of the first k neighbors, for each k up to the `max_k` of the search."""
    k_effective = {k: min(k, found.available) for k in sorted(set(ks))}
    classes, encoded = torch.unique(torch.cat([found.train_labels, found.target]), return_inverse=True)
    train_classes, true_classes = encoded[: len(found.train_labels)], encoded[len(found.train_labels) :]
    ranks: dict[int, list[Tensor]] = {k: [] for k in k_effective}
    predicted: dict[int, list[Tensor]] = {k: [] for k in k_effective}
    step = max(1, _VOTES // len(classes))
    for rows in (slice(start, start + step) for start in range(0, len(found.target), step)):
        part = Neighbors(found.similarity[rows], found.indices[rows])
        counts = votes(part, train_classes, len(classes), ks=list(k_effective.values()), temperature=temperature)
        for k, count in zip(k_effective, counts, strict=True):
            has_vote = count.gather(1, true_classes[rows, None])[:, 0] > 0
            ranks[k].append(rank_of_true_class(true_classes[rows], count).where(has_vote, UNRANKED))
            predicted[k].append(classes[count.argmax(dim=1)])
    return KNNResult(
        ranks={k: torch.cat(parts) for k, parts in ranks.items()},
        predicted={k: torch.cat(parts) for k, parts in predicted.items()},
        k_effective=k_effective,
        warnings=_warnings(k_effective, found),
    )


def votes(
    neighbors: Neighbors, labels: Tensor, classes: int, *, ks: Sequence[int], temperature: float
) -> Iterator[Tensor]:
    """Yield the votes (Q, classes) float32 of the first k neighbors for each of the ascending `ks`, as running sums.

    A neighbor of similarity s votes exp((s - largest s) / temperature): the shift does not change the order within a
    row, nothing overflows, and no vote is 0. `labels` (N,) are those of the training images, in [0, classes).
    """
    similarity = neighbors.similarity
    weight = ((similarity - similarity[:, :1]) / temperature).exp().clamp(min=torch.finfo(similarity.dtype).tiny)
    voted = labels[neighbors.indices]  # (Q, k)
    total = similarity.new_zeros(len(similarity), classes)
    for start, stop in zip([0, *ks], ks, strict=False):
        total = total.scatter_add(1, voted[:, start:stop], weight[:, start:stop])
        yield total


def rank_of_true_class(target: Tensor, scores: Tensor) -> Tensor:
    """Count the classes (Q,) ranked before the target by scores (Q, C); among equal scores the lower class is first."""
    true_score = scores.gather(1, target[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return ((scores > true_score) | ((scores == true_score) & lower)).sum(dim=1)


def train_test_overlap(
    source: FeatureSource, found: NeighborResult, split: TrainTestSplit
) -> tuple[dict[str, Any], list[str]]:
    """Count test images that equal a training image, or with leave-one-out another image: they inflate every score.

    Only the files of images with nearly equal features are compared. Also return a warning if there are any.
    """
    pairs = found.near_duplicates().cpu()  # (P, 2)
    queries = source.train if source.test is None else source.test
    test = split.train if split.test is None else split.test
    indices = torch.stack([queries.index[pairs[:, 0]], source.train.index[pairs[:, 1]]], dim=1)
    duplicates = dict(reversed(exact_duplicates(test, split.train, indices).tolist()))  # of each image its nearest
    names = [(test.name(a), split.train.name(duplicates[a])) for a in sorted(duplicates)[:_MAX_NAMES]]
    near = len(torch.unique(pairs[:, 0]))
    other = "another image" if found.leave_one_out else "a training image"
    text = f"{pluralize(near, 'test image')} nearly equal to {other} (cosine > {NEAR_DUPLICATE})"
    if duplicates:
        text += f", {len(duplicates):,} of them byte for byte, for example {' = '.join(names[0])}"
    data_info = {"near_duplicates": near, "identical_files": {"count": len(duplicates), "names": names}}
    return data_info, [text] if near else []


def overlap_warnings(source: FeatureSource, split: TrainTestSplit) -> list[str]:
    """Return a warning if test images equal training images, for up to 1,000 of them, evenly spaced."""
    if source.test is None:
        return []
    rows = evenly_spaced(len(source.test.index), _COMPARED)
    some = source._replace(test=source.test.take(rows))
    train, queries = (
        LabeledFeatures(part.cls[:, -1].float(), part.labels) for part in (source.train, source.test.take(rows))
    )
    _, texts = train_test_overlap(some, search(train, queries, max_k=1), split)
    return [f"of {len(rows):,} test images compared, {text}" for text in texts]


def _warnings(k_effective: dict[int, int], found: NeighborResult) -> list[str]:
    clamped = [k for k, used in k_effective.items() if used < k]
    smallest, single = found.smallest_class(), int((found.voters() == 0).sum())
    above = [k for k, used in k_effective.items() if used > smallest]
    texts = []
    if clamped:
        texts.append(f"k = {_join(clamped)}: there are only {k_effective[clamped[0]]} neighbors, all of them vote")
    if above and smallest:
        size = f"{smallest} others beside an image" if found.leave_one_out else pluralize(smallest, "image")
        texts.append(
            f"k = {_join(above)} exceeds the smallest class ({size}): votes of other classes are added; use a smaller k"
        )
    if single:
        texts.append(f"{pluralize(single, 'class', 'classes')} of a single image: leave-one-out cannot predict it")
    return texts


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
