"""An inverted-file index (faiss) over features: the nearest of millions in milliseconds, nearly all of them found."""

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
_ROWS_PER_LIST = 39  # the fewest that k-means wants to place a center by,
_MOST_ROWS_PER_LIST = 64  # and the most that it is given: four times as many cost four times the time
_ASKED = 1000  # rows that the probes are chosen by, and as many others that the recall is measured on
_CHUNK = 65536  # rows


class StaleIndexError(UserError):
    """The file holds no index of these features."""


class IndexQuality(NamedTuple):
    """What an index is worth, measured on images of the set itself, each by the others."""

    lists: int  # that the rows are divided into, by k-means
    probes: int  # of them that are searched per query
    k: int  # neighbors asked for
    wanted: float  # recall
    recall: float  # share of the true k nearest that were found, of queries that the probes were not chosen by
    queries: int  # that this was measured with
    build_seconds: float
    query_ms: float  # of one query alone, the median


class Index:
    """Rows of features in lists around k-means centers, of which only the nearest few are searched.

    Within them the search is exact: IndexIVFFlat, inner products of rows of length 1.
    """

    def __init__(self, lists: IndexIVFFlat, quality: IndexQuality, fingerprint: str) -> None:
        self._lists = lists
        self.quality = quality
        self._fingerprint = fingerprint

    @classmethod
    def build(cls, features: Tensor, *, k: int, recall: float, seed: int) -> Self:
        """Divide features (N, D) into lists, and search as many of them as the wanted recall needs.

        There are 4 sqrt(N) lists, but no more than one per 39 rows. The probes are the fewest that find the wanted
        share of the true k nearest of 1,000 rows drawn at random; the recall is then measured on 1,000 others (halves
        of all rows, where there are fewer). All of them are rows of the index: of images that are not in it, other
        images than those it was built from, a smaller share may be found.

        Args:
            features: Of the images to be searched among.
            k: Neighbors that will be asked for, below N.
            recall: The share of them to be found, in (0, 1].
            seed: Of the rows drawn.
        """
        started = time.perf_counter()
        faiss = load_faiss()
        count = max(1, min(round(_LISTS * math.sqrt(len(features))), len(features) // _ROWS_PER_LIST))
        rows = _normalized(features)
        centers = faiss.IndexFlatIP(rows.shape[1])
        lists = faiss.IndexIVFFlat(centers, rows.shape[1], count, faiss.METRIC_INNER_PRODUCT)
        lists.cp.max_points_per_centroid = _MOST_ROWS_PER_LIST
        lists.train(rows.numpy())
        lists.add(rows.numpy())

        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: 2 * _ASKED]
        choosing, measuring = drawn.chunk(2)
        engine = choose_engine("auto", rows.device)
        truth = exact_search(rows[choosing], rows, k=k, own=choosing, engine=engine)
        lists.nprobe = _probes(lists, rows, choosing, truth.place, recall)
        seconds = time.perf_counter() - started

        truth = exact_search(rows[measuring], rows, k=k, own=measuring, engine=engine)
        found = _search(lists, rows[measuring], k, measuring)
        last = truth.similarity[:, -1:] - 1e-6  # what is as near as the k-th is as good
        share = float((found.similarity >= last).float().mean())
        times = [_milliseconds(lists, rows[row : row + 1], k) for row in measuring[:100].tolist()]
        quality = IndexQuality(
            count, lists.nprobe, k, recall, share, len(measuring), round(seconds, 2), round(float(np.median(times)), 3)
        )
        return cls(lists, quality, _fingerprint(features))

    def nearest(self, queries: Tensor, *, k: int, own: Tensor | None = None) -> Neighbors:
        """The k nearest to each query (Q, D), as far as they lie in the lists that are searched.

        Args:
            queries: What to search for; of any length above 0.
            k: At most N, or N - 1 with `own`.
            own: For each query its own place among the features (Q,) int64, which is not among its neighbors.
        """
        return _search(self._lists, _normalized(queries), k, own)

    def save(self, path: Path) -> None:
        """Write the index to a file, whole or not at all."""
        about = {"fingerprint": self._fingerprint, "quality": self.quality._asdict()}
        with atomic_write(path) as file:
            np.savez(file, index=load_faiss().serialize_index(self._lists), about=np.array(json.dumps(about)))

    @classmethod
    def load(cls, path: Path, features: Tensor) -> Self:
        """The index of these features (N, D) from a file.

        Raises:
            StaleIndexError: The file is damaged, or holds an index of other features.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                stored = arrays["index"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StaleIndexError(f"{path} holds no index: {error}") from error
        if about["fingerprint"] != _fingerprint(features):
            raise StaleIndexError(f"{path} is an index of other features")
        return cls(load_faiss().deserialize_index(stored), IndexQuality(**about["quality"]), about["fingerprint"])


def _probes(lists: IndexIVFFlat, rows: Tensor, asked: Tensor, neighbors: Tensor, recall: float) -> int:
    """The fewest lists per query that hold the wanted share of its `neighbors` (Q, k).

    A query's lists are searched in the order of their centers' products with it; a neighbor is found once its own
    list's turn has come.
    """
    everyone = lists.nlist
    _, order = lists.quantizer.search(rows[asked].numpy(), everyone)  # (Q, lists)
    _, home = lists.quantizer.search(rows[neighbors.flatten()].numpy(), 1)  # (Q k, 1)
    turn = np.empty_like(order)
    np.put_along_axis(turn, order, np.arange(everyone)[None].repeat(len(order), 0), axis=1)
    turns = np.sort(np.take_along_axis(turn, home.reshape(neighbors.shape), axis=1), axis=None)
    return int(turns[math.ceil(recall * len(turns)) - 1]) + 1


def _search(lists: IndexIVFFlat, queries: Tensor, k: int, own: Tensor | None) -> Neighbors:
    """The k nearest in the lists probed; in all lists, where those hold fewer."""
    faiss = load_faiss()
    wanted = min(lists.ntotal, k if own is None else k + 1)
    similarity, place = lists.search(queries.numpy(), wanted)
    short = np.flatnonzero((place < 0).any(axis=1))  # faiss fills up with -1
    if len(short):
        everywhere = faiss.SearchParametersIVF(nprobe=lists.nlist)
        similarity[short], place[short] = lists.search(queries.numpy()[short], wanted, params=everywhere)
    found = Neighbors(torch.from_numpy(similarity), torch.from_numpy(place))
    if own is None:
        return found
    # The own place goes to the end of its row; where many exact copies have crowded it out, the last of them goes.
    order = (found.place == own[:, None]).int().argsort(dim=1, stable=True)[:, :k]
    return Neighbors(found.similarity.gather(1, order), found.place.gather(1, order))


def _milliseconds(lists: IndexIVFFlat, query: Tensor, k: int) -> float:
    started = time.perf_counter()
    lists.search(query.numpy(), k)
    return 1000 * (time.perf_counter() - started)


def _normalized(features: Tensor) -> Tensor:
    """Rows of length 1, float32, on the CPU."""
    return F.normalize(features.cpu().float(), dim=1).contiguous()


def _fingerprint(features: Tensor) -> str:
    """A hash of the features (N, D) as float32."""
    digest = hashlib.sha256(repr(tuple(features.shape)).encode())
    for part in torch.split(features, _CHUNK):
        digest.update(part.cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
