"""Inverted-file index (faiss IVF) over features: approximate nearest neighbors of millions in milliseconds."""

from __future__ import annotations

import hashlib
import json
import math
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.evaluation.classification.nearest_neighbors import Neighbors, choose_engine, exact_search, load_faiss
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError

if TYPE_CHECKING:
    from faiss import IndexIVFFlat

_LISTS = 4  # times the square root of the rows: faiss's guideline for up to a million
_MIN_ROWS_PER_LIST = 39  # the fewest that k-means accepts per center,
_MAX_ROWS_PER_LIST = 64  # and the most that it is given: four times as many take four times as long
_QUERIES = 1000  # rows that the number of probes is selected on, and as many others that measure the recall
_CHUNK = 65536  # rows


class StaleIndexError(UserError):
    """The file is not an index of these features."""


class IndexQuality(NamedTuple):
    """The quality of an index, measured on its own images, each searched among the others."""

    lists: int  # number of k-means lists
    probes: int  # lists searched per query
    k: int  # neighbors per query
    target_recall: float
    recall: float  # fraction of the true k nearest that was found, for queries not used to select the probes
    queries: int  # number of these queries
    build_seconds: float
    query_ms: float  # median time of a single query


class IVFIndex:
    """Features in lists around k-means centers, of which only the nearest few are searched.

    Within the lists the search is exact: IndexIVFFlat, inner products of rows of length 1.
    """

    def __init__(self, lists: IndexIVFFlat, quality: IndexQuality, fingerprint: str) -> None:
        self._lists = lists
        self.quality = quality
        self._fingerprint = fingerprint

    @classmethod
    def build(cls, features: Tensor, *, k: int, recall: float, seed: int) -> Self:
        """Divide features (N, D) into lists, and select how many of them are searched for the target recall.

        There are 4 sqrt(N) lists, but at most one per 39 rows. The number of probes is the smallest that finds the
        target fraction `recall` of the true k < N nearest of 1,000 random rows; the recall is then measured on 1,000
        others (halves of all rows, if there are fewer). Queries that are not rows may have a lower recall.
        """
        started = time.perf_counter()
        faiss = load_faiss()
        count = max(1, min(round(_LISTS * math.sqrt(len(features))), len(features) // _MIN_ROWS_PER_LIST))
        rows = _normalize(features)
        centers = faiss.IndexFlatIP(rows.shape[1])
        lists = faiss.IndexIVFFlat(centers, rows.shape[1], count, faiss.METRIC_INNER_PRODUCT)
        lists.cp.max_points_per_centroid = _MAX_ROWS_PER_LIST
        lists.train(rows.numpy())
        lists.add(rows.numpy())

        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: 2 * _QUERIES]
        selecting, measuring = drawn.chunk(2)
        engine = choose_engine("auto", rows.device)
        target = exact_search(rows[selecting], rows, k=k, exclude=selecting, engine=engine)
        lists.nprobe = _select_probes(lists, rows[selecting], rows[target.indices.flatten()], recall)
        seconds = time.perf_counter() - started

        target = exact_search(rows[measuring], rows, k=k, exclude=measuring, engine=engine)
        found = _search(lists, rows[measuring], k, measuring)
        threshold = target.similarity[:, -1:] - 1e-6  # neighbors as near as the k-th count as found
        measured = float((found.similarity >= threshold).float().mean())
        times = []
        for row in measuring[:100].tolist():
            start = time.perf_counter()
            lists.search(rows[row : row + 1].numpy(), k)
            times.append(1000 * (time.perf_counter() - start))
        query_ms = round(float(np.median(times)), 3)
        quality = IndexQuality(count, lists.nprobe, k, recall, measured, len(measuring), round(seconds, 2), query_ms)
        return cls(lists, quality, _fingerprint(features))

    def search(self, queries: Tensor, *, k: int, exclude: Tensor | None = None) -> Neighbors:
        """Find the k nearest to each query (Q, D), of any length above 0, within the searched lists.

        With `exclude` (Q,) int64 the row of that index is not a neighbor of the query, because it is the same image.
        """
        return _search(self._lists, _normalize(queries), k, exclude)

    def save(self, path: Path) -> None:
        """Write the index to a file atomically."""
        description = {"fingerprint": self._fingerprint, "quality": self.quality._asdict()}
        with atomic_write(path) as file:
            np.savez(
                file, index=load_faiss().serialize_index(self._lists), description=np.array(json.dumps(description))
            )

    @classmethod
    def load(cls, path: Path, features: Tensor) -> Self:
        """Load the index of these features (N, D) from a file.

        Raises:
            StaleIndexError: The file is damaged, or an index of other features.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                description = json.loads(str(arrays["description"]))
                lists = arrays["index"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StaleIndexError(f"{path} is not an index: {error}") from error
        if description["fingerprint"] != _fingerprint(features):
            raise StaleIndexError(f"{path} is an index of other features")
        quality = IndexQuality(**description["quality"])
        return cls(load_faiss().deserialize_index(lists), quality, description["fingerprint"])


def _select_probes(lists: IndexIVFFlat, queries: Tensor, neighbors: Tensor, recall: float) -> int:
    """Return the smallest number of lists per query that contains the target fraction of its neighbors (Q k, D)."""
    _, order = lists.quantizer.search(queries.numpy(), lists.nlist)  # (Q, lists)
    _, own_list = lists.quantizer.search(neighbors.numpy(), 1)  # (Q k, 1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(lists.nlist)[None].repeat(len(order), 0), axis=1)
    ranks = np.sort(np.take_along_axis(rank, own_list.reshape(len(queries), -1), axis=1), axis=None)
    return int(ranks[math.ceil(recall * len(ranks)) - 1]) + 1


def _search(lists: IndexIVFFlat, queries: Tensor, k: int, exclude: Tensor | None) -> Neighbors:
    """Find the k nearest in the probed lists, or in all lists if those contain fewer."""
    faiss = load_faiss()
    count = min(lists.ntotal, k if exclude is None else k + 1)
    similarity, indices = lists.search(queries.numpy(), count)
    short = np.flatnonzero((indices < 0).any(axis=1))  # faiss pads with -1
    if len(short):
        all_lists = faiss.SearchParametersIVF(nprobe=lists.nlist)
        similarity[short], indices[short] = lists.search(queries.numpy()[short], count, params=all_lists)
    found = Neighbors(torch.from_numpy(similarity), torch.from_numpy(indices))
    if exclude is None:
        return found
    # The excluded index moves to the end of its row and is cut off; if duplicates have displaced it, the last of them.
    order = (found.indices == exclude[:, None]).int().argsort(dim=1, stable=True)[:, :k]
    return Neighbors(found.similarity.gather(1, order), found.indices.gather(1, order))


def _normalize(features: Tensor) -> Tensor:
    """Return rows of length 1, float32, on the CPU."""
    return F.normalize(features.cpu().float(), dim=1).contiguous()


def _fingerprint(features: Tensor) -> str:
    """Hash features (N, D) as float32."""
    digest = hashlib.sha256(repr(tuple(features.shape)).encode())
    for part in torch.split(features, _CHUNK):
        digest.update(part.cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
