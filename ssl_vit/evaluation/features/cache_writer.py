"""Describing images into a store: what is done is never done again, by however many processes, whatever ends them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout

from ssl_vit.config.pretrain import Workers
from ssl_vit.data.dataset import Subset
from ssl_vit.evaluation.features.cache import BROKEN, DONE, TO_DO, FeatureCache
from ssl_vit.evaluation.features.extractor import iter_features
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import freed_memory_kept, torchrun_rank

_FLUSH_S = 5.0  # what a killed process has to do again
_POLL_S, _PATIENCE_S = 0.2, 600.0

log = logging.getLogger(__name__)


class Filled(NamedTuple):
    """A store in which nothing is left to do, for this process at least."""

    store: FeatureCache
    new: int  # images described by this process just now
    seconds: float  # that it took for that


def fill_cache(stores: list[FeatureCache], *, batch_size: int, num_workers: Workers) -> Filled:
    """The first of the stores with all images described, or another one that has them already.

    Processes that torchrun started describe a contiguous share of the images each. The first makes the folder, keeps
    other commands out of it, and returns when all is done; the others return when their share is.

    Args:
        stores: As `candidate_caches` gives them.
        batch_size: Images loaded together.
        num_workers: Loading processes.

    Raises:
        UserError: Another process of this launch has stopped describing its share.
        OSError: The disk is full, or the folder cannot be written to.
    """
    for store in stores:
        if store.complete() and not store.problem():
            return Filled(store, 0, 0.0)
    store = stores[0]
    rank, world = torchrun_rank()
    count = len(store.dataset)
    share = range(count * rank // world, count * (rank + 1) // world)
    if rank:
        while not store.folder.exists() or store.problem():  # the first process makes it, perhaps anew
            time.sleep(_POLL_S)
        return _describe(store, share, batch_size, num_workers)
    with _locked(store):
        if not store.folder.exists():
            store.create()
        elif problem := store.problem():
            log.warning(f"{store.folder}: {problem}: the features are made anew")
            store.create()
        result = _describe(store, share, batch_size, num_workers)
        _wait_for_others(store)
    return result


@contextmanager
def _locked(store: FeatureCache) -> Iterator[None]:
    """Keep other commands out of the store; the lock dies with its process, however that ends."""
    store.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(store.folder.with_name(f".{store.folder.name}.lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.warning(f"{store.folder}: another command describes these images; waiting until it has ended")
        held = lock.acquire()
    with held:
        yield


def _describe(store: FeatureCache, share: range, batch_size: int, num_workers: Workers) -> Filled:
    """Describe the images of a share that are to do."""
    started = time.perf_counter()
    rows = share.start + np.flatnonzero(store.state()[share.start : share.stop] == TO_DO)
    if not len(rows):
        return Filled(store, 0, 0.0)
    left = Subset(store.dataset, torch.from_numpy(rows))
    try:
        with freed_memory_kept(), _Writer(store, rows) as writer:
            for places, said in iter_features(
                store.describe, left, batch_size=batch_size, num_workers=num_workers, skipped=store.skipped
            ):
                writer.put(
                    places.numpy(),
                    {"cls.npy": said.cls.half().numpy(), "patch_mean.npy": said.patch_mean.half().numpy()},
                )
            writer.rest_is_broken()
    except KeyboardInterrupt:
        done = int((store.state() != TO_DO).sum())
        log.warning(
            f"\n{done:,} of {len(store.dataset):,} images are described and kept in {store.folder}: the same "
            "command goes on behind them"
        )
        raise
    except OSError as error:
        error.filename = error.filename or str(store.folder)  # a failed write does not say where
        raise
    return Filled(store, len(rows), time.perf_counter() - started)


class _Writer:
    """Puts rows into their places in a store's files, by plain positioned writes: several machines may do so at once.

    Args:
        store: With its files.
        rows: Of the images that are to be described (M,), ascending.
    """

    def __init__(self, store: FeatureCache, rows: npt.NDArray[np.int64]) -> None:
        self.store = store
        self.rows = rows
        self.arrays = store.arrays
        self.state = np.full(len(rows), BROKEN, dtype=np.uint8)  # until they are put
        self.seen = 0  # of the rows, described or found broken
        self.flushed = 0  # of them, on the disk and marked
        self.last_flush = time.monotonic()

    def __enter__(self) -> _Writer:
        with ExitStack() as opened:
            self.files = {
                name: opened.enter_context((self.store.folder / name).open("r+b"))
                for name in ("cls.npy", "patch_mean.npy", "state.npy")
            }
            self.opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self.opened:
            self.flush()

    def put(self, places: npt.NDArray[np.int64], values: dict[str, npt.NDArray[Any]]) -> None:
        """Values of the rows at these places (B,), ascending; what lies between them is broken."""
        for name, value in values.items():
            self._write(name, self.rows[places], value)
        self.state[places] = DONE
        self.seen = int(places[-1]) + 1
        if time.monotonic() - self.last_flush > _FLUSH_S:
            self.flush()

    def rest_is_broken(self) -> None:
        """What has not been put by now cannot be read."""
        self.seen = len(self.rows)

    def flush(self) -> None:
        """Bring what was put onto the disk, and only then mark it as done."""
        if self.seen == self.flushed:
            return
        for name in ("cls.npy", "patch_mean.npy"):
            self._sync(name)
        if self.store.skipped.path.exists():
            with self.store.skipped.path.open("rb") as file:
                os.fsync(file.fileno())
        news = slice(self.flushed, self.seen)
        self._write("state.npy", self.rows[news], self.state[news])
        self._sync("state.npy")
        self.flushed, self.last_flush = self.seen, time.monotonic()

    def _write(self, name: str, rows: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> None:
        array, file = self.arrays[name], self.files[name]
        gaps = np.flatnonzero(np.diff(rows) != 1) + 1
        for run, part in zip(np.split(rows, gaps), np.split(values, gaps), strict=True):
            file.seek(len(array.header) + int(run[0]) * array.row_bytes)
            file.write(part.tobytes())

    def _sync(self, name: str) -> None:
        self.files[name].flush()
        os.fsync(self.files[name].fileno())


def _wait_for_others(store: FeatureCache) -> None:
    """Until the other processes have described their shares.

    Raises:
        UserError: Nothing new has come for minutes.
    """
    left, since = len(store.dataset), time.monotonic()
    while missing := int((store.state() == TO_DO).sum()):
        if missing < left:
            left, since = missing, time.monotonic()
        if time.monotonic() - since > _PATIENCE_S:
            raise UserError(
                f"{store.folder}: {missing:,} images are left to another process of this launch, which has described "
                f"none for {_PATIENCE_S / 60:.0f} minutes; the same command goes on behind those that are done"
            )
        time.sleep(_POLL_S)
