"""Fill the feature cache; resumable, and shared between processes."""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ssl_vit.config.pretrain import Workers
from ssl_vit.data.dataset import Subset
from ssl_vit.evaluation.features.cache import BROKEN, DONE, PENDING, FeatureCache, row_checksums
from ssl_vit.evaluation.features.extractor import FeatureBatch, iter_features
from ssl_vit.runtime.atomic_io import lock_file
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import keep_freed_memory, torchrun_rank
from ssl_vit.runtime.text import pluralize

_VALUES = ("cls.npy", "patch_mean.npy")  # files that are written row by row, as the two below
_SUMS, _STATE = "checksums.npy", "state.npy"
_FLUSH_S = 5.0  # work lost at most when the process is killed
_POLL_S, _TIMEOUT_S = 0.2, 600.0

log = logging.getLogger(__name__)


class FillResult(NamedTuple):
    """A cache without pending images, at least in the share of this process."""

    cache: FeatureCache
    new: int  # images extracted by this call
    seconds: float


def fill_cache(caches: list[FeatureCache], *, batch_size: int, num_workers: Workers) -> FillResult:
    """Fill the first of the caches (of `candidate_caches`), unless one of them is complete already.

    Each process of a torchrun launch extracts a contiguous share of the images. Rank 0 creates the folder, locks it
    against other commands, and returns when all images are done; the other ranks return when their share is done.

    Raises:
        UserError: Another process of this launch has stopped extracting its share.
        OSError: The disk is full, or the folder is not writable.
    """
    for cache in caches:
        if cache.complete() and not cache.validate():
            return FillResult(cache, 0, 0.0)
    cache = caches[0]
    rank, world = torchrun_rank()
    count = len(cache.dataset)
    share = range(count * rank // world, count * (rank + 1) // world)
    if rank:
        while not cache.folder.exists() or cache.validate():  # until rank 0 has created or replaced it
            time.sleep(_POLL_S)
        return _extract_pending(cache, share, batch_size, num_workers)
    with _locked(cache):
        if not cache.folder.exists():
            cache.create()
        elif problem := cache.validate():
            log.warning(f"{cache.folder}: {problem}; extracting the features again")
            cache.create()
        result = _extract_pending(cache, share, batch_size, num_workers)
        _wait_for_other_ranks(cache)
    return result


@contextmanager
def _locked(cache: FeatureCache) -> Iterator[None]:
    """Lock the cache against other commands; the lock is released when its process ends, however it ends."""
    cache.folder.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"{cache.folder}: another command is extracting these features; waiting for it to finish"
    with lock_file(cache.folder.with_name(f".{cache.folder.name}.lock"), waiting=waiting):
        yield


def _extract_pending(cache: FeatureCache, share: range, batch_size: int, num_workers: Workers) -> FillResult:
    """Extract the features of the pending images of a share."""
    started = time.perf_counter()
    rows = share.start + np.flatnonzero(cache.state()[share.start : share.stop] == PENDING)
    if not len(rows):
        return FillResult(cache, 0, 0.0)
    pending = Subset(cache.dataset, torch.from_numpy(rows))
    try:
        with keep_freed_memory(), ExitStack() as files:
            opened = {
                name: files.enter_context((cache.folder / name).open("r+b")) for name in (*_VALUES, _SUMS, _STATE)
            }
            writer = _CacheWriter(cache, rows, opened)
            files.callback(writer.flush)
            for indices, batch in iter_features(
                cache.extractor, pending, batch_size=batch_size, num_workers=num_workers, skipped=cache.skipped
            ):
                writer.put(indices.numpy(), batch)
            writer.seen = len(rows)  # those that were not put are broken
    except KeyboardInterrupt:
        done = int((cache.state() != PENDING).sum())
        log.warning(
            f"\n{cache.folder} holds the features of {done:,} of {pluralize(len(cache.dataset), 'image')}; "
            "run the same command again to continue"
        )
        raise
    except OSError as error:
        error.filename = error.filename or str(cache.folder)  # not set by a failed write
        raise
    return FillResult(cache, len(rows), time.perf_counter() - started)


class _CacheWriter:
    """Write rows of a cache by positioned writes, so that several processes and machines can share it."""

    def __init__(self, cache: FeatureCache, rows: npt.NDArray[np.int64], files: Mapping[str, BinaryIO]) -> None:
        self.cache = cache
        self.rows = rows  # (M,) indices of the images to be extracted, ascending
        self.files = files  # of features and states, opened for writing
        self.arrays = {name: np.load(cache.folder / name, mmap_mode="r") for name in files}
        self.state = np.full(len(rows), BROKEN, dtype=np.uint8)  # until they are put
        self.sums = np.full(len(rows), zlib.crc32(bytes([BROKEN])), dtype=np.uint32)
        self.seen = 0  # number of rows extracted or found broken
        self.flushed = 0  # number of those on the disk, with their state
        self.last_flush = time.monotonic()

    def put(self, indices: npt.NDArray[np.int64], batch: FeatureBatch) -> None:
        """Write the features of some of the rows, by ascending indices (B,) of `rows`; rows between them are broken."""
        cls, patch_mean = (values.half().numpy() for values in batch)
        for name, values in zip(_VALUES, (cls, patch_mean), strict=True):
            self._write(name, self.rows[indices], values)
        self.state[indices] = DONE
        self.sums[indices] = row_checksums(self.state[indices], cls, patch_mean)
        self.seen = int(indices[-1]) + 1
        if time.monotonic() - self.last_flush > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Sync the values to the disk, and only then write their state."""
        if self.seen == self.flushed:
            return
        new = slice(self.flushed, self.seen)
        self._write(_SUMS, self.rows[new], self.sums[new])
        for name in (*_VALUES, _SUMS):
            self._sync(name)
        if self.cache.skipped.path.exists():
            with self.cache.skipped.path.open("rb") as file:
                os.fsync(file.fileno())
        self._write(_STATE, self.rows[new], self.state[new])
        self._sync(_STATE)
        self.flushed, self.last_flush = self.seen, time.monotonic()

    def _write(self, name: str, rows: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> None:
        array, file = self.arrays[name], self.files[name]
        gaps = np.flatnonzero(np.diff(rows) != 1) + 1
        for run, part in zip(np.split(rows, gaps), np.split(values, gaps), strict=True):
            file.seek(array.offset + int(run[0]) * array[:1].nbytes)
            file.write(part.tobytes())

    def _sync(self, name: str) -> None:
        self.files[name].flush()
        os.fsync(self.files[name].fileno())


def _wait_for_other_ranks(cache: FeatureCache) -> None:
    """Wait until the other processes have extracted their shares, or make no progress for minutes."""
    pending, since = len(cache.dataset), time.monotonic()
    while count := int((cache.state() == PENDING).sum()):
        if count < pending:
            pending, since = count, time.monotonic()
        if time.monotonic() - since > _TIMEOUT_S:
            raise UserError(
                f"{cache.folder}: {pluralize(count, 'image')} of another process of this launch are still pending, "
                f"without progress for {_TIMEOUT_S / 60:.0f} minutes. Run the same command again to continue"
            )
        time.sleep(_POLL_S)
