"""Dataset of tar shards in the WebDataset layout, read by random access."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, JPEGScaleFn, UnreadableImageError, escape_path
from ssl_vit.data.sources.decode import decode
from ssl_vit.data.sources.image_folder import format_counts, unlabeled
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.data.sources.shard_index import (
    Integers,
    ShardIndex,
    compressed_message,
    concat_indices,
    index_tar,
    read_manifest,
    read_shard_index,
)
from ssl_vit.data.sources.split_folders import role_in
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.runtime.text import pluralize, truncate_list
from ssl_vit.runtime.workers import map_processes

log = logging.getLogger(__name__)

_MAX_OPEN = 128  # tar files kept open per process; the default limits are 256 (macOS) and 1,024 (Linux) files
_SHOWN = 8  # damaged shards listed in a message
_COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|Z)|tgz|tbz2?|txz|tzst)$")


class TarShardDataset(ImageDataset):
    """Images in tar files, read by random access instead of streaming.

    So shards are shuffled, split over processes and resumed exactly like a folder; a streaming reader could not resume
    exactly. The tar files must be on a mounted POSIX file system. Any number of threads and processes may read.

    `classes` are the names of the labels 0, 1, ... in `.cls` members; if there are too few, the labels that occur are
    the names. Images have labels only if all of them have one. `ignored` counts other members by kind.
    """

    def __init__(
        self, root: Path, index: ShardIndex, classes: list[str], *, ignored: Counter[str], damaged: int = 0
    ) -> None:
        self.root = root
        self.index = index
        self.ignored = ignored
        self.damaged = damaged
        self.labels, self.classes = _labels_and_classes(index.label, classes)

    @cached_property
    def _open(self) -> Callable[[Path], _OpenTar]:
        return lru_cache(_MAX_OPEN)(_OpenTar)

    def __getstate__(self) -> dict[str, Any]:  # open files stay in their process
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def name(self, index: int) -> str:
        """Return `<tar file>/<member>`, printable; `ssl-vit shard` keeps the original path in the `.json` member."""
        tar = self.index.tars[self.index.tar[index]]
        return escape_path(tar + b"/" + self.index.names[index])

    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        content = self.content(index)
        try:
            return decode(BytesIO(content), channels, jpeg_scale, self.value_range)
        except UnreadableImageError as error:
            raise UnreadableImageError(self.name(index), error.reason) from error

    def content(self, index: int) -> bytes:
        path = self.root / os.fsdecode(self.index.tars[self.index.tar[index]])
        size = int(self.index.size[index])
        try:
            content = self._open(path).read(size, int(self.index.offset[index]))
        except OSError as error:
            raise UnreadableImageError(self.name(index), f"{escape_path(path.name)}: {error.strerror}") from error
        if len(content) < size:
            raise UnreadableImageError(self.name(index), f"{escape_path(path.name)} has become shorter")
        return content

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        index = self.index
        digest = hashlib.sha256(f"{index.tars.fingerprint()} {index.names.fingerprint()}".encode())
        digest.update(index.tar.tobytes() + index.label.tobytes())
        if sizes:
            digest.update(index.size.tobytes())
        if times:
            changed = [(self.root / os.fsdecode(tar)).stat().st_mtime_ns for tar in index.tars]
            digest.update(str(changed).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        text = (
            f"{pluralize(len(self), 'image')} in {pluralize(len(self.index.tars), 'shard')} in {escape_path(self.root)}"
        )
        text += f"; ignored: {format_counts(self.ignored)}" if self.ignored else ""
        return f"{text}; damaged shards: {self.damaged}" if self.damaged else text


def load_shards(root: Path) -> TarShardDataset:
    """Load the images of all `*.tar` files below a folder, sorted by path; links to folders are not followed.

    Shards written by `ssl-vit shard` have an index; others are indexed each time, on all cores.

    Raises:
        UserError: The folder does not exist, has no tar file or no image, or has a compressed tar file.
    """
    if not root.is_dir():
        problem = "is a file; name the folder that it is in" if root.exists() else "does not exist"
        raise UserError(f"{escape_path(root.absolute())} {problem}; data.source=shards expects a folder of .tar files")
    paths = _tar_files(root)
    _check_splits(root, paths)
    tars = PackedPaths.from_iterable(os.fsencode(path.relative_to(root)) for path in paths)
    sizes = np.array([path.stat().st_size for path in paths], dtype=np.int64)
    manifest = read_manifest(root)
    classes = manifest.classes if manifest else []
    index = read_shard_index(root, tars, sizes)
    if index is not None:
        return TarShardDataset(root, index, classes, ignored=Counter())
    indices = list(map_processes(index_tar, paths, label="indexing shards", show=is_rank_zero()))
    ignored = sum((tar.ignored for tar in indices), Counter[str]())
    damaged = [
        f"{escape_path(path.relative_to(root))}: {tar.damage}"
        for path, tar in zip(paths, indices, strict=True)
        if tar.damage
    ]
    index = concat_indices(tars, indices)
    if not len(index.names):
        found = f", only {format_counts(ignored)}" if ignored else ""
        problem = (
            f"{escape_path(root.absolute())}: no image in {pluralize(len(paths), '.tar file')} of this folder{found}"
        )
        raise UserError("\n  ".join([problem, *truncate_list(damaged, _SHOWN)]))
    if ignored and is_rank_zero():
        log.warning(f"{pluralize(ignored.total(), 'member')} of the tar files ignored: {format_counts(ignored)}")
    if damaged and is_rank_zero():
        problem = f"{len(damaged)} of {pluralize(len(paths), 'shard')} damaged; the samples before the damage are used"
        log.warning("\n  ".join([problem, *truncate_list(damaged, _SHOWN)]))
    return TarShardDataset(root, index, classes, ignored=ignored, damaged=len(damaged))


class _OpenTar:
    """A tar file that is closed when its last reference goes, so not while a thread reads from it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """Read `size` bytes from `offset` on; fewer at the end of the file."""
        return os.pread(self._descriptor, size, offset)


def _tar_files(root: Path) -> list[Path]:
    """Find the tar files below a folder, sorted by path."""
    found = [path for path in root.rglob("*.t[abgxz]*") if path.is_file() and not path.name.startswith(".")]
    if compressed := [path for path in found if _COMPRESSED_NAME.search(path.name)]:
        raise UserError(compressed_message(min(compressed)))
    tars = sorted((path for path in found if path.suffix == ".tar"), key=os.fsencode)
    if not tars:
        raise UserError(
            f"{escape_path(root.absolute())}: this folder contains no .tar file. Write some with "
            "`ssl-vit shard`, or read a folder of images with data.source=folder"
        )
    return tars


def _check_splits(root: Path, paths: list[Path]) -> None:
    """Check that the tar files of a folder are not those of several splits, by their names.

    Raises:
        UserError: They are, as in `imagenet-train-000.tar` beside `imagenet-val-000.tar`.
    """
    for folder in {path.parent for path in paths}:
        roles = {role_in(path.stem): path.name for path in paths if path.parent == folder}
        roles.pop(None, None)
        if len(roles) > 1:
            names = " and ".join(escape_path(name) for name in sorted(roles.values()))
            raise UserError(
                f"{escape_path(folder)}: {names} look like different splits, which would be mixed: move or link the "
                "files of each split into a folder of its own"
            )


def _labels_and_classes(label: Integers, classes: list[str]) -> tuple[Tensor, list[str]]:
    """Return labels (N,) and class names."""
    if label.min() < 0:
        return unlabeled(len(label))
    if label.max() < len(classes):
        return torch.from_numpy(label), classes
    present, labels = np.unique(label, return_inverse=True)
    return torch.from_numpy(labels), [str(number) for number in present]
