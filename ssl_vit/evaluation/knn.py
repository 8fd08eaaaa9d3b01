"""Exact kNN classification of frozen features: one search at the largest k serves every k."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Engine = Literal["torch", "faiss"]

NEAR_DUPLICATE = 0.9999  # cosine above which two pictures count as the same
_QUERIES, _BANK = 256, 65536  # sides of a block of similarities: 64 MB
_VOTES = 1 << 24  # entries of a block of votes: 64 MB


class Labelled(NamedTuple):
    """Features and the classes of their pictures."""

    features: Tensor  # (N, D) float
    labels: Tensor  # (N,) int64, any numbers


class Neighbours(NamedTuple):
    """The k nearest in the bank to each of Q queries: the nearest first, of equally near ones the earlier first."""

    similarity: Tensor  # (Q, k) float32
    place: Tensor  # (Q, k) int64, rows of the bank


class KNNResult(NamedTuple):
    """How kNN classified Q queries, for each k that was asked for."""

    ranks: dict[int, Tensor]  # (Q,) int64: how many classes came before the true one; 0 is right
    k_effective: dict[int, int]  # the neighbours that voted: k, or all there were
    near_duplicates: int  # queries with a neighbour of cosine above NEAR_DUPLICATE
    warnings: list[str]


def knn(
    bank: Labelled, queries: Labelled | None, *, ks: Sequence[int], temperature: float, engine: Engine = "torch"
) -> KNNResult:
    """Classify queries by the votes of their k nearest in the bank (Wu et al. 2018; DINO's `eval_knn.py`).

    Neighbours are those of largest cosine s, and each votes exp(s / temperature) for its class. Without queries the
    bank classifies itself, each picture by the others (leave-one-out).
    """
    normalised = F.normalize(bank.features.float(), dim=1)
    if queries is None:
        neighbours_at_most = len(normalised) - 1
        truth = bank.labels
        asking, own = normalised, torch.arange(len(normalised), device=normalised.device)
    else:
        neighbours_at_most = len(normalised)
        truth = queries.labels
        asking, own = F.normalize(queries.features.float(), dim=1), None
    k_effective = {k: min(k, neighbours_at_most) for k in sorted(set(ks))}
    found = nearest(asking, normalised, k=max(k_effective.values()), own=own, engine=engine)

    classes, places = torch.unique(torch.cat([bank.labels, truth]), return_inverse=True)
    bank_classes, true_classes = places[: len(bank.labels)], places[len(bank.labels) :]
    ranks: dict[int, list[Tensor]] = {k: [] for k in k_effective}
    step = max(1, _VOTES // len(classes))
    for rows in (slice(start, start + step) for start in range(0, len(truth), step)):
        part = Neighbours(found.similarity[rows], found.place[rows])
        counts = votes(part, bank_classes, len(classes), ks=list(k_effective.values()), temperature=temperature)
        for k, count in zip(k_effective, counts, strict=True):
            ranks[k].append(rank_of(true_classes[rows], count))
    return KNNResult(
        ranks={k: torch.cat(parts) for k, parts in ranks.items()},
        k_effective=k_effective,
        near_duplicates=int((found.similarity[:, 0] > NEAR_DUPLICATE).sum()),
        warnings=_warnings(k_effective, bank.labels),
    )


def knn_accuracy(bank: Labelled, queries: Labelled | None, *, k: int, temperature: float = 0.07) -> float:
    """Share of queries that kNN classifies rightly, in [0, 1]; NaN where a feature is not finite."""
    parts = [bank] if queries is None else [bank, queries]
    if not all(part.features.isfinite().all() for part in parts):
        return float("nan")
    ranks = knn(bank, queries, ks=[k], temperature=temperature).ranks[k]
    return float((ranks == 0).float().mean())


def nearest(
    queries: Tensor, bank: Tensor, *, k: int, own: Tensor | None = None, engine: Engine = "torch"
) -> Neighbours:
    """The k rows of the bank (N, D) with the largest dot product with each query (Q, D), all float32 and finite.

    Args:
        queries: What to search for.
        bank: What to search in.
        k: At most N, or N - 1 with `own`.
        own: For each query its own place in the bank (Q,) int64, which is not among its neighbours.
        engine: Both give the same neighbours; faiss works on the CPU.
    """
    with full_precision():
        if engine == "faiss":
            return _faiss(queries, bank, k, own)
        return _blockwise(queries, bank, k, own)


def votes(
    neighbours: Neighbours, labels: Tensor, classes: int, *, ks: Sequence[int], temperature: float
) -> Iterator[Tensor]:
    """The votes (Q, classes) float32 of the first k neighbours for each of the ascending `ks`, as running sums.

    A neighbour of similarity s votes exp((s - largest s) / temperature): the shift changes no comparison within a
    row, and nothing overflows. `labels` (N,) are the bank's, in [0, classes).
    """
    similarity = neighbours.similarity
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    voted = labels[neighbours.place]  # (Q, k)
    total = similarity.new_zeros(len(similarity), classes)
    for start, stop in zip([0, *ks], ks, strict=False):
        total = total.scatter_add(1, voted[:, start:stop], weight[:, start:stop])
        yield total


def rank_of(truth: Tensor, scores: Tensor) -> Tensor:
    """How many classes come before the true one (Q,) by scores (Q, C); of equal scores the lower class comes first."""
    true_score = scores.gather(1, truth[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < truth[:, None]
    return ((scores > true_score) | ((scores == true_score) & lower)).sum(dim=1)


def _blockwise(queries: Tensor, bank: Tensor, k: int, own: Tensor | None) -> Neighbours:
    """Search block by block of queries and bank, keeping the best so far: memory does not grow with the bank."""
    memory = queries.new_empty(_QUERIES * min(_BANK, len(bank)))  # kept: fresh pages cost as much as the product
    parts = []
    for first in range(0, len(queries), _QUERIES):
        asking = queries[first : first + _QUERIES]
        best = Neighbours(asking.new_empty(len(asking), 0), asking.new_empty(len(asking), 0, dtype=torch.int64))
        for start in range(0, len(bank), _BANK):
            block = bank[start : start + _BANK]
            scores = memory[: len(asking) * len(block)].view(len(asking), len(block))
            torch.mm(asking, block.T, out=scores)
            if own is not None:
                _hide(scores, own[first : first + _QUERIES] - start)
            best = _merge(best, _top(scores, k), start, k)
        parts.append(best)
    return Neighbours(torch.cat([part.similarity for part in parts]), torch.cat([part.place for part in parts]))


def _hide(scores: Tensor, own: Tensor) -> None:
    """Rule out column `own` (Q,) of each row of scores (Q, M), where it lies in this block."""
    rows = ((own >= 0) & (own < scores.shape[1])).nonzero().squeeze(1)
    scores[rows, own[rows]] = -torch.inf


def _merge(best: Neighbours, block: Neighbours, start: int, k: int) -> Neighbours:
    """The k best of both; the block, whose rows begin at `start`, comes after `best`, so among equals too."""
    similarity = torch.cat([best.similarity, block.similarity], dim=1)
    place = torch.cat([best.place, block.place + start], dim=1)
    top = _top(similarity, k)
    return Neighbours(top.similarity, place.gather(1, top.place))


def _top(scores: Tensor, k: int) -> Neighbours:
    """The k best columns of scores (Q, M), or all M; of equal ones the first, which `torch.topk` does not promise."""
    k = min(k, scores.shape[1])
    value, place = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if value.shape[1] > k:
        tied = (value[:, k - 1] == value[:, k]).nonzero().squeeze(1)  # rows where equals stand on both sides of k
        value, place = value[:, :k], place[:, :k]
        if len(tied):
            place[tied] = _first_of_equals(scores[tied], value[tied, -1:], k)
            value[tied] = scores[tied].gather(1, place[tied])
    return _ordered(value, place)


def _first_of_equals(scores: Tensor, last: Tensor, k: int) -> Tensor:
    """The k columns (T, k) whose score is above the k-th best, `last` (T, 1), or equal to it and early enough."""
    above, equal = scores > last, scores == last
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= room))
    return chosen.nonzero()[:, 1].view(len(scores), k)


def _ordered(value: Tensor, place: Tensor) -> Neighbours:
    """Each row by descending value, equal values by ascending place."""
    place, order = place.sort(dim=1)
    value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Neighbours(value, place.gather(1, order))


def _faiss(queries: Tensor, bank: Tensor, k: int, own: Tensor | None) -> Neighbours:
    """The same search by faiss; rows whose k-th and next neighbour are equal are searched again, for their order."""
    import faiss  # beside torch it loads a second OpenMP, so only where it was asked for

    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    wanted = min(len(bank), k + 1 if own is None else k + 2)
    found = faiss.knn(queries.cpu().numpy(), bank.cpu().numpy(), wanted, metric=faiss.METRIC_INNER_PRODUCT)
    value, place = (torch.from_numpy(part).to(queries.device) for part in found)
    if own is not None:
        value[place == own[:, None]] = -torch.inf
    similarity, place = _ordered(value, place)
    if wanted > k:
        tied = (similarity[:, k - 1] == similarity[:, k]).nonzero().squeeze(1)
        similarity, place = similarity[:, :k], place[:, :k]
        if len(tied):
            similarity[tied], place[tied] = _blockwise(queries[tied], bank, k, None if own is None else own[tied])
    return Neighbours(similarity, place)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32: training may have allowed TF32 or bfloat16, which scramble near neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _warnings(k_effective: dict[int, int], labels: Tensor) -> list[str]:
    clamped = [k for k, used in k_effective.items() if used < k]
    smallest = int(torch.unique(labels, return_counts=True)[1].min())
    above = [k for k, used in k_effective.items() if used > smallest]
    texts = []
    if clamped:
        texts.append(f"k = {_listed(clamped)}: there are only {k_effective[clamped[0]]} neighbours, all of them vote")
    if above:
        texts.append(
            f"k = {_listed(above)} exceeds the smallest class ({smallest} pictures): "
            "votes of other classes fill up; prefer a smaller k"
        )
    return texts


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
