"""Exact kNN classification of frozen features: one search at the largest k serves every k and temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.evaluation.classification.nearest_neighbors import Neighbors, Wanted, choose_engine, exact_search

NEAR_DUPLICATE = 0.9999  # cosine above which two images count as the same
_VOTES = 1 << 24  # entries of a block of votes: 64 MB


class LabeledFeatures(NamedTuple):
    """Features and the classes of their images."""

    features: Tensor  # (N, D) float
    labels: Tensor  # (N,) int64, any numbers


class NeighborResult(NamedTuple):
    """The neighbors of Q queries, and the classes that they vote for."""

    similarity: Tensor  # (Q, k) float32: cosine, the largest first
    place: Tensor  # (Q, k) int64, rows of the bank
    bank_labels: Tensor  # (N,) int64
    truth: Tensor  # (Q,) int64: the queries' own labels
    available: int  # neighbors that there are: N, or all others of one set

    def near_duplicates(self) -> Tensor:
        """Pairs (P, 2) of a query and a row of the bank whose cosine is above NEAR_DUPLICATE."""
        query, column = (self.similarity > NEAR_DUPLICATE).nonzero(as_tuple=True)
        return torch.stack([query, self.place[query, column]], dim=1)

    @property
    def left_one_out(self) -> bool:
        """Whether the queries are the bank itself: an image has no vote on itself."""
        return self.available < len(self.bank_labels)

    def voters(self) -> Tensor:
        """Images (C,) of each class of the bank that can vote for it."""
        counts: Tensor = torch.unique(self.bank_labels, return_counts=True)[1]
        return counts - int(self.left_one_out)

    def smallest_class(self) -> int:
        """The fewest voters of a class that has some: with a larger k, votes of other classes fill up; 0 without."""
        voters = self.voters()
        return int(voters[voters > 0].min()) if voters.any() else 0


class KNNResult(NamedTuple):
    """How kNN classified Q queries, for each k that was asked for."""

    ranks: dict[int, Tensor]  # (Q,) int64: how many classes came before the true one; 0 is right
    predicted: dict[int, Tensor]  # (Q,) int64: the labels with most votes; of equal ones the lowest
    k_effective: dict[int, int]  # the neighbors that voted: k, or all there were
    near_duplicates: int  # queries with a neighbor of cosine above NEAR_DUPLICATE
    warnings: list[str]


def knn(
    bank: LabeledFeatures,
    queries: LabeledFeatures | None,
    *,
    ks: Sequence[int],
    temperature: float,
    engine: Wanted = "auto",
) -> KNNResult:
    """Classify queries by the votes of their k nearest in the bank (Wu et al. 2018; DINO's `eval_knn.py`).

    Neighbors are those of largest cosine s, and each votes exp(s / temperature) for its class. Without queries the
    bank classifies itself, each image by the others (leave-one-out).
    """
    return classify(search(bank, queries, most=max(ks), engine=engine), ks=ks, temperature=temperature)


def search(
    bank: LabeledFeatures, queries: LabeledFeatures | None, *, most: int, engine: Wanted = "auto"
) -> NeighborResult:
    """The `most` nearest in the bank to each query, or all there are; without queries, to each image of the bank."""
    normalized = F.normalize(bank.features.float(), dim=1)
    if queries is None:
        available = len(normalized) - 1
        asking, own = normalized, torch.arange(len(normalized), device=normalized.device)
    else:
        available = len(normalized)
        asking, own = F.normalize(queries.features.float(), dim=1), None
    chosen = choose_engine(engine, normalized.device)
    found = exact_search(asking, normalized, k=min(most, available), own=own, engine=chosen)
    return NeighborResult(*found, bank.labels, (bank if queries is None else queries).labels, available)


def classify(found: NeighborResult, *, ks: Sequence[int], temperature: float) -> KNNResult:
    """The votes of the first k neighbors, for each k; none above the `most` that were searched for."""
    k_effective = {k: min(k, found.available) for k in sorted(set(ks))}
    classes, places = torch.unique(torch.cat([found.bank_labels, found.truth]), return_inverse=True)
    bank_classes, true_classes = places[: len(found.bank_labels)], places[len(found.bank_labels) :]
    ranks: dict[int, list[Tensor]] = {k: [] for k in k_effective}
    predicted: dict[int, list[Tensor]] = {k: [] for k in k_effective}
    step = max(1, _VOTES // len(classes))
    for rows in (slice(start, start + step) for start in range(0, len(found.truth), step)):
        part = Neighbors(found.similarity[rows], found.place[rows])
        counts = votes(part, bank_classes, len(classes), ks=list(k_effective.values()), temperature=temperature)
        for k, count in zip(k_effective, counts, strict=True):
            ranks[k].append(rank_of_true_class(true_classes[rows], count))
            predicted[k].append(classes[count.argmax(dim=1)])
    return KNNResult(
        ranks={k: torch.cat(parts) for k, parts in ranks.items()},
        predicted={k: torch.cat(parts) for k, parts in predicted.items()},
        k_effective=k_effective,
        near_duplicates=int((found.similarity[:, 0] > NEAR_DUPLICATE).sum()),
        warnings=_warnings(k_effective, found),
    )


def votes(
    neighbors: Neighbors, labels: Tensor, classes: int, *, ks: Sequence[int], temperature: float
) -> Iterator[Tensor]:
    """The votes (Q, classes) float32 of the first k neighbors for each of the ascending `ks`, as running sums.

    A neighbor of similarity s votes exp((s - largest s) / temperature): the shift changes no comparison within a
    row, and nothing overflows. `labels` (N,) are the bank's, in [0, classes).
    """
    similarity = neighbors.similarity
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    voted = labels[neighbors.place]  # (Q, k)
    total = similarity.new_zeros(len(similarity), classes)
    for start, stop in zip([0, *ks], ks, strict=False):
        total = total.scatter_add(1, voted[:, start:stop], weight[:, start:stop])
        yield total


def rank_of_true_class(truth: Tensor, scores: Tensor) -> Tensor:
    """How many classes come before the true one (Q,) by scores (Q, C); of equal scores the lower class comes first."""
    true_score = scores.gather(1, truth[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < truth[:, None]
    return ((scores > true_score) | ((scores == true_score) & lower)).sum(dim=1)


def _warnings(k_effective: dict[int, int], found: NeighborResult) -> list[str]:
    clamped = [k for k, used in k_effective.items() if used < k]
    smallest, alone = found.smallest_class(), int((found.voters() == 0).sum())
    above = [k for k, used in k_effective.items() if used > smallest]
    texts = []
    if clamped:
        texts.append(f"k = {_listed(clamped)}: there are only {k_effective[clamped[0]]} neighbors, all of them vote")
    if above and smallest:
        size = f"{smallest} {'others beside a image' if found.left_one_out else 'pictures'}"
        texts.append(
            f"k = {_listed(above)} exceeds the smallest class ({size}): "
            "votes of other classes fill up; prefer a smaller k"
        )
    if alone:
        texts.append(f"classes of a single image: {alone:,}; left out, that image can never be classified rightly")
    return texts


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
