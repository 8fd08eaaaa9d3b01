"""Exact nearest neighbors by dot product: blocks of torch products, or faiss."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.runtime.device import autocast_dtype

Engine = Literal["torch", "faiss"]
Wanted = Literal["auto", "torch", "faiss"]

_QUERIES, _BANK = 256, 65536  # sides of a block of similarities: 64 MB
_GROUP = 8  # columns of a block of which only the largest is looked at first
_ROOMY = 6  # groups per neighbor from which on that pays


class Neighbors(NamedTuple):
    """The k nearest in the bank to each of Q queries: the nearest first, of equally near ones the earlier first.

    Equally near as float32 computes it: rows of a bank above 65,536 may be multiplied in two ways, a rounding apart.
    """

    similarity: Tensor  # (Q, k) float32
    place: Tensor  # (Q, k) int64, rows of the bank


def choose_engine(wanted: Wanted, device: torch.device) -> Engine:
    """The engine that searches on `device`; `auto` is torch, but on CPUs without bfloat16, where it is slower, faiss.

    The size does not matter: where faiss is faster in spite of bfloat16 (few rows for many neighbors), it is by
    milliseconds. `tools/bench_knn.py` measures both.
    """
    if wanted != "auto":
        return wanted
    return "torch" if device.type == "cuda" or autocast_dtype(device) else "faiss"


def exact_search(
    queries: Tensor, bank: Tensor, *, k: int, own: Tensor | None = None, engine: Engine = "torch"
) -> Neighbors:
    """The k rows of the bank (N, D) with the largest dot product with each query (Q, D), all float32 and finite.

    Args:
        queries: What to search for.
        bank: What to search in.
        k: At most N, or N - 1 with `own`.
        own: For each query its own place in the bank (Q,) int64, which is not among its neighbors.
        engine: Both give the same neighbors; faiss works on the CPU.
    """
    with full_precision():
        if engine == "faiss":
            return _faiss(queries, bank, k, own)
        return _blockwise(queries, bank, k, own)


class _Rough(NamedTuple):
    """A block of the bank (M, D) without its mean, in bfloat16, and how wrong products with it can be."""

    rows: Tensor  # (M', D) bfloat16, M' the next multiple of _GROUP
    center: Tensor  # (D,) what was taken off every row; it shifts all products of a query alike
    length: Tensor  # () of the longest row
    lost: Tensor  # () length of the most that rounding took off a row
    size: int  # M

    @classmethod
    def of(cls, block: Tensor) -> _Rough:
        center = block.mean(dim=0)
        centerd = block - center
        rows = F.pad(centerd.bfloat16(), (0, 0, 0, -len(block) % _GROUP))
        lost = (centerd - rows[: len(block)]).norm(dim=1).max()
        return cls(rows, center, centerd.norm(dim=1).max(), lost, len(block))

    def error(self, queries: Tensor, rounded: Tensor) -> Tensor:
        """Bound (Q, 1) of |rounded . row - query . centerd row|, by Cauchy-Schwarz, with float32's own rounding."""
        sums = queries.shape[1] * torch.finfo(torch.float32).eps * 2
        query = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
        off = torch.linalg.vector_norm(queries - rounded, dim=1, keepdim=True)
        longest = self.length + torch.linalg.vector_norm(self.center)
        bound: Tensor = off * self.length + (query + off) * self.lost + sums * query * longest
        return bound


def _blockwise(queries: Tensor, bank: Tensor, k: int, own: Tensor | None) -> Neighbors:
    """Search block by block of queries and bank, keeping the best so far: memory does not grow with the bank."""
    blocks = {start: bank[start : start + _BANK] for start in range(0, len(bank), _BANK)}
    rounding = queries.device.type == "cpu" and autocast_dtype(queries.device) is not None
    large = _ROOMY * _GROUP * k if rounding else torch.inf
    roughs = {start: _Rough.of(block) for start, block in blocks.items() if len(block) >= large}
    # Kept: fresh pages cost as much as the product.
    memory = queries.new_empty(_QUERIES * len(blocks[0]))
    rough_memory = memory.new_empty(_QUERIES * (len(blocks[0]) + _GROUP), dtype=torch.bfloat16)
    parts = []
    for first in range(0, len(queries), _QUERIES):
        asking = queries[first : first + _QUERIES]
        best = Neighbors(asking.new_empty(len(asking), 0), asking.new_empty(len(asking), 0, dtype=torch.int64))
        for start, block in blocks.items():
            hidden = None if own is None else own[first : first + _QUERIES] - start
            found = None
            if start in roughs:
                pairs = _candidates(asking, roughs[start], k, hidden, best.similarity, rough_memory)
                if pairs is None:
                    del roughs[start]  # its rows are too much alike, for the next queries as well
                else:
                    found = _measured(asking, block, pairs, k)
            best = _merge(best, found or _plain(asking, block, k, hidden, memory), start, k)
        parts.append(best)
    return Neighbors(torch.cat([part.similarity for part in parts]), torch.cat([part.place for part in parts]))


def _plain(asking: Tensor, block: Tensor, k: int, hidden: Tensor | None, memory: Tensor) -> Neighbors:
    """The k nearest of a block (M, D), by all its products."""
    scores = memory[: len(asking) * len(block)].view(len(asking), len(block))
    torch.mm(asking, block.T, out=scores)
    if hidden is not None:
        _hide(scores, hidden)
    return _top(scores, k)


def _candidates(
    asking: Tensor, rough: _Rough, k: int, hidden: Tensor | None, best: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Pairs (P,) of a query and a row that include all of the k nearest, in ascending order; None if they are many.

    At least k groups of columns have their largest rough product at `floor` or above. So the true k-th best product
    lies at most the error below it, and what is among the k best has a rough product at most twice the error below.
    """
    rounded, width = asking.bfloat16(), len(rough.rows)
    scores = memory[: len(asking) * width].view(len(asking), width)
    torch.mm(rounded, rough.rows.T, out=scores)
    scores[:, rough.size :] = -torch.inf
    if hidden is not None:
        _hide(scores, hidden)
    groups = scores.view(len(asking), _GROUP, -1)  # neighbors in a group are as far apart as there are groups
    largest = groups.amax(dim=1)
    error = rough.error(asking, rounded)
    floor = largest.float().topk(k, dim=1).values[:, -1:]
    floor = floor - floor.abs() * torch.finfo(torch.bfloat16).eps / 2 - error  # the products were rounded, too
    if best.shape[1] == k:  # in the blocks before
        floor = torch.maximum(floor, best[:, -1:] - (asking @ rough.center)[:, None])
    least = (floor - error).bfloat16()  # rounded as the products were, so no order is lost
    query, group = (largest >= least).nonzero(as_tuple=True)
    if len(query) > largest.numel() // 4:
        return None
    pair, member = (groups[query, :, group] >= least[query]).nonzero(as_tuple=True)
    found = (query[pair] * width + member * largest.shape[1] + group[pair]).sort().values
    return found // width, found % width


def _measured(asking: Tensor, block: Tensor, pairs: tuple[Tensor, Tensor], k: int) -> Neighbors:
    """The k nearest among pairs of a query and a row of the block, by their products; -inf where there are fewer."""
    query, place = pairs
    starts = F.pad(torch.bincount(query, minlength=len(asking)).cumsum(0), (1, 0))
    size = len(asking), len(block)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        wanted = torch.sparse_csr_tensor(starts, place, asking.new_zeros(len(place)), size, check_invariants=False)
    order = torch.arange(len(place)) - starts[query]
    value = asking.new_full((len(asking), max(k, int(starts.diff().max()))), -torch.inf)
    places = torch.zeros_like(value, dtype=torch.int64)
    value[query, order] = torch.sparse.sampled_addmm(wanted, asking, block.T, beta=0.0).values()
    places[query, order] = place
    top = _top(value, k)
    return Neighbors(top.similarity, places.gather(1, top.place))


def _hide(scores: Tensor, own: Tensor) -> None:
    """Rule out column `own` (Q,) of each row of scores (Q, M), where it lies in this block."""
    rows = ((own >= 0) & (own < scores.shape[1])).nonzero().squeeze(1)
    scores[rows, own[rows]] = -torch.inf


def _merge(best: Neighbors, block: Neighbors, start: int, k: int) -> Neighbors:
    """The k best of both; the block, whose rows begin at `start`, comes after `best`, so among equals too."""
    if not start:
        return block
    similarity = torch.cat([best.similarity, block.similarity], dim=1)
    place = torch.cat([best.place, block.place + start], dim=1)
    top = _top(similarity, k)
    return Neighbors(top.similarity, place.gather(1, top.place))


def _top(scores: Tensor, k: int) -> Neighbors:
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


def _ordered(value: Tensor, place: Tensor) -> Neighbors:
    """Each row by descending value, equal values by ascending place."""
    place, order = place.sort(dim=1)
    value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Neighbors(value, place.gather(1, order))


def _faiss(queries: Tensor, bank: Tensor, k: int, own: Tensor | None) -> Neighbors:
    """The same search by faiss; rows whose k-th and next neighbor are equal are searched again, for their order."""
    faiss = load_faiss()
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
    return Neighbors(similarity, place)


def load_faiss() -> ModuleType:
    """The module, set to as many threads as torch; beside torch it loads a second OpenMP, so only where it is used."""
    import faiss

    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    return faiss


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32: training may have allowed TF32 or bfloat16, which scramble near neighbors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
