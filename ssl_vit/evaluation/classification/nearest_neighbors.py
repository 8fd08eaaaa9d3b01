"""Exact nearest neighbors by dot product, with blocks of torch products or with faiss."""

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
EngineChoice = Literal["auto", "torch", "faiss"]

_QUERIES, _ROWS = 256, 65536  # sides of a block of similarities: 64 MB
_GROUP = 8  # columns of a block of which only the largest is compared first
_MIN_GROUPS = 6  # per neighbor, from which on that pays


class Neighbors(NamedTuple):
    """The k nearest rows of N features to each of Q queries: nearest first, among equally near ones the lower index.

    Equally near by float32 arithmetic: beyond 65,536 rows a product may be computed in two ways, a rounding apart.
    """

    similarity: Tensor  # (Q, k) float32
    indices: Tensor  # (Q, k) int64, of rows of the features


def choose_engine(engine: EngineChoice, device: torch.device) -> Engine:
    """Return the engine for a device: by default torch on GPUs and on CPUs with bfloat16, faiss on other CPUs.

    The default is not always the faster one: for 2,000 queries of 50,000 x 384 on one core with bfloat16, torch took
    0.51 s for k=20 and 0.81 s for k=200, faiss 0.56 s and 0.60 s. `tests/benchmarks/bench_knn.py` measures both.
    """
    if engine != "auto":
        return engine
    return "torch" if device.type == "cuda" or autocast_dtype(device) else "faiss"


def exact_search(
    queries: Tensor, features: Tensor, *, k: int, exclude: Tensor | None = None, engine: Engine = "torch"
) -> Neighbors:
    """Find the k features (N, D) with the largest dot product with each query (Q, D), all float32 and finite.

    Args:
        queries: Vectors to find the neighbors of.
        features: Vectors to search.
        k: At most N, or N - 1 with `exclude`.
        exclude: Index (Q,) int64 of the row that is not a neighbor of the query, because it is the same image.
        engine: Both find the same neighbors; faiss works on the CPU.
    """
    with full_precision():
        if engine == "faiss":
            return _faiss(queries, features, k, exclude)
        return _blockwise(queries, features, k, exclude)


class _RoundedBlock(NamedTuple):
    """A block of features (M, D) without its mean, in bfloat16, and what bounds the error of products with it."""

    rows: Tensor  # (M', D) bfloat16, M' the next multiple of _GROUP
    center: Tensor  # (D,) subtracted from every row; it shifts all products of a query alike
    length: Tensor  # () of the longest row
    lost: Tensor  # () length of the largest rounding error of a row
    size: int  # M

    @classmethod
    def of(cls, block: Tensor) -> _RoundedBlock:
        center = block.mean(dim=0)
        centered = block - center
        rows = F.pad(centered.bfloat16(), (0, 0, 0, -len(block) % _GROUP))
        lost = (centered - rows[: len(block)]).norm(dim=1).max()
        return cls(rows, center, centered.norm(dim=1).max(), lost, len(block))

    def error(self, queries: Tensor, rounded: Tensor) -> Tensor:
        """Bound |rounded . row - query . centered row| (Q, 1) by Cauchy-Schwarz, with float32's own rounding."""
        sums = queries.shape[1] * torch.finfo(torch.float32).eps * 2
        query = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
        off = torch.linalg.vector_norm(queries - rounded, dim=1, keepdim=True)
        longest = self.length + torch.linalg.vector_norm(self.center)
        bound: Tensor = off * self.length + (query + off) * self.lost + sums * query * longest
        return bound


def _blockwise(queries: Tensor, features: Tensor, k: int, exclude: Tensor | None) -> Neighbors:
    """Search block by block, keeping the best so far: memory does not grow with the number of features."""
    blocks = {start: features[start : start + _ROWS] for start in range(0, len(features), _ROWS)}
    rounding = queries.device.type == "cpu" and autocast_dtype(queries.device) is not None
    large = _MIN_GROUPS * _GROUP * k if rounding else torch.inf
    rounded = {start: _RoundedBlock.of(block) for start, block in blocks.items() if len(block) >= large}
    # Allocated once: fresh pages cost as much as the product.
    memory = queries.new_empty(_QUERIES * len(blocks[0]))
    rounded_memory = memory.new_empty(_QUERIES * (len(blocks[0]) + _GROUP), dtype=torch.bfloat16)
    parts = []
    for first in range(0, len(queries), _QUERIES):
        batch = queries[first : first + _QUERIES]
        best = Neighbors(batch.new_empty(len(batch), 0), batch.new_empty(len(batch), 0, dtype=torch.int64))
        for start, block in blocks.items():
            excluded = None if exclude is None else exclude[first : first + _QUERIES] - start
            found = None
            if start in rounded:
                pairs = _candidates(batch, rounded[start], k, excluded, best.similarity, rounded_memory)
                if pairs is None:
                    del rounded[start]  # its rows are too similar, for the next queries as well
                else:
                    found = _best_pairs(batch, block, pairs, k)
            best = _merge(best, found or _all_products(batch, block, k, excluded, memory), start, k)
        parts.append(best)
    return Neighbors(torch.cat([part.similarity for part in parts]), torch.cat([part.indices for part in parts]))


def _all_products(queries: Tensor, block: Tensor, k: int, excluded: Tensor | None, memory: Tensor) -> Neighbors:
    """Find the k nearest rows of a block (M, D) from all products."""
    scores = memory[: len(queries) * len(block)].view(len(queries), len(block))
    torch.mm(queries, block.T, out=scores)
    if excluded is not None:
        _exclude(scores, excluded)
    return _top(scores, k)


def _candidates(
    queries: Tensor, block: _RoundedBlock, k: int, excluded: Tensor | None, best: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return pairs (P,) of a query and a row, ascending, that include all of the k nearest; None if they are many.

    At least k groups of columns have their largest rounded product at `floor` or above. So the true k-th best product
    is at most the error below it, and those among the k best have a rounded product at most twice the error below.
    """
    rounded, width = queries.bfloat16(), len(block.rows)
    scores = memory[: len(queries) * width].view(len(queries), width)
    torch.mm(rounded, block.rows.T, out=scores)
    scores[:, block.size :] = -torch.inf
    if excluded is not None:
        _exclude(scores, excluded)
    groups = scores.view(len(queries), _GROUP, -1)  # neighbors in a group are as far apart as there are groups
    largest = groups.amax(dim=1)
    error = block.error(queries, rounded)
    floor = largest.float().topk(k, dim=1).values[:, -1:]
    floor = floor - floor.abs() * torch.finfo(torch.bfloat16).eps / 2 - error  # the products were rounded, too
    if best.shape[1] == k:  # in the blocks before
        floor = torch.maximum(floor, best[:, -1:] - (queries @ block.center)[:, None])
    least = (floor - error).bfloat16()  # rounded as the products were, so no order is lost
    query, group = (largest >= least).nonzero(as_tuple=True)
    if len(query) > largest.numel() // 4:
        return None
    pair, member = (groups[query, :, group] >= least[query]).nonzero(as_tuple=True)
    found = (query[pair] * width + member * largest.shape[1] + group[pair]).sort().values
    return found // width, found % width


def _best_pairs(queries: Tensor, block: Tensor, pairs: tuple[Tensor, Tensor], k: int) -> Neighbors:
    """Find the k nearest among pairs of a query and a row of the block; -inf if there are fewer."""
    query, row = pairs
    starts = F.pad(torch.bincount(query, minlength=len(queries)).cumsum(0), (1, 0))
    size = len(queries), len(block)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        mask = torch.sparse_csr_tensor(starts, row, queries.new_zeros(len(row)), size, check_invariants=False)
    order = torch.arange(len(row)) - starts[query]
    value = queries.new_full((len(queries), max(k, int(starts.diff().max()))), -torch.inf)
    rows = torch.zeros_like(value, dtype=torch.int64)
    value[query, order] = torch.sparse.sampled_addmm(mask, queries, block.T, beta=0.0).values()
    rows[query, order] = row
    top = _top(value, k)
    return Neighbors(top.similarity, rows.gather(1, top.indices))


def _exclude(scores: Tensor, columns: Tensor) -> None:
    """Set one of the columns (Q,) of each row of scores (Q, M) to -inf, if it lies in this block."""
    rows = ((columns >= 0) & (columns < scores.shape[1])).nonzero().squeeze(1)
    scores[rows, columns[rows]] = -torch.inf


def _merge(best: Neighbors, block: Neighbors, start: int, k: int) -> Neighbors:
    """Return the k best of both; among equals `best` precedes the block, whose rows begin at `start`."""
    if not start:
        return block
    similarity = torch.cat([best.similarity, block.similarity], dim=1)
    indices = torch.cat([best.indices, block.indices + start], dim=1)
    top = _top(similarity, k)
    return Neighbors(top.similarity, indices.gather(1, top.indices))


def _top(scores: Tensor, k: int) -> Neighbors:
    """Return the k best columns of scores (Q, M), or all M; among equals the first, unlike `torch.topk`."""
    k = min(k, scores.shape[1])
    value, column = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if value.shape[1] > k:
        tied = (value[:, k - 1] == value[:, k]).nonzero().squeeze(1)  # rows with equals on both sides of k
        value, column = value[:, :k], column[:, :k]
        if len(tied):
            column[tied] = _first_of_equals(scores[tied], value[tied, -1:], k)
            value[tied] = scores[tied].gather(1, column[tied])
    return _sort(value, column)


def _first_of_equals(scores: Tensor, last: Tensor, k: int) -> Tensor:
    """Return the k columns (T, k) with a score above the k-th best, `last` (T, 1), or equal to it and early enough."""
    above, equal = scores > last, scores == last
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= room))
    return chosen.nonzero()[:, 1].view(len(scores), k)


def _sort(value: Tensor, indices: Tensor) -> Neighbors:
    """Sort each row by descending value, and equal values by ascending index."""
    indices, order = indices.sort(dim=1)
    value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Neighbors(value, indices.gather(1, order))


def _faiss(queries: Tensor, features: Tensor, k: int, exclude: Tensor | None) -> Neighbors:
    """Search with faiss; rows whose k-th and next neighbor are equal are searched again, for their order."""
    faiss = load_faiss()
    count = min(len(features), k + 1 if exclude is None else k + 2)
    found = faiss.knn(queries.cpu().numpy(), features.cpu().numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
    value, indices = (torch.from_numpy(part).to(queries.device) for part in found)
    if exclude is not None:
        value[indices == exclude[:, None]] = -torch.inf
    similarity, indices = _sort(value, indices)
    if count > k:
        tied = (similarity[:, k - 1] == similarity[:, k]).nonzero().squeeze(1)
        similarity, indices = similarity[:, :k], indices[:, :k]
        if len(tied):
            excluded = None if exclude is None else exclude[tied]
            similarity[tied], indices[tied] = _blockwise(queries[tied], features, k, excluded)
    return Neighbors(similarity, indices)


def load_faiss() -> ModuleType:
    """Import faiss, with as many threads as torch; lazily, because it loads a second OpenMP."""
    import faiss

    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    return faiss


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: training may have allowed TF32 or bfloat16, which reorder near neighbors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
