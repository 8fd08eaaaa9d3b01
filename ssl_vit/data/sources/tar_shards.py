"""Images in tar shards of the WebDataset layout, read by random access."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import weakref
from collections import Counter
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit.data.dataset import JPEGScaleFn, UnreadableImageError, escape_path
from ssl_vit.data.sources.decode import decode
from ssl_vit.data.sources.image_folder import format_counts, unlabeled
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.data.sources.shard_index import ShardIndex, concat_indices, read_listing, read_manifest
from ssl_vit.data.sources.tar_index import Integers, index_tar, refusal
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.runtime.workers import map_processes

log = logging.getLogger(__name__)

_MOST_OPEN = 128  # tar files that a process keeps open; systems allow 256 files (macOS) or 1,024 (Linux) unless told
_SHOWN = 8  # damaged shards that are named
_COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|Z)|tgz|tbz2?|txz|tzst)$")


class TarShardDataset:
    """Images in tar files, each read from its own place as if it lay in a file: no stream, no shuffle buffer.

    So shards are shuffled, split over processes and resumed exactly as a folder is; a reader that streams them could
    not go on exactly where it stopped. The tar files must lie on a mounted file system, of a POSIX machine. Any number
    of threads and processes may read, forked, spawned or pickled.

    Args:
        root: What the tar files' names are relative to.
        listing: Where each image lies.
        classes: The names of the classes 0, 1, ... in `.cls` members; where there are none, or too few, the numbers
            that occur are the names. Images have labels if each of them has a class.
        ignored: How many members of which kind there are beside the images.
        damaged: How many tar files are.
    """

    def __init__(
        self, root: Path, listing: ShardIndex, classes: list[str], *, ignored: Counter[str], damaged: int = 0
    ) -> None:
        self.root = root
        self.listing = listing
        self.ignored = ignored
        self.damaged = damaged
        self.labels, self.classes = _labels(listing.number, classes)
        self._open = lru_cache(_MOST_OPEN)(_OpenTar)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(_MOST_OPEN)(_OpenTar)

    def __len__(self) -> int:
        return len(self.listing.names)

    def name(self, index: int) -> str:
        """`<tar file>/<member>`, printable; where `ssl-vit shard` wrote it, the `.json` beside it has the old path."""
        tar = self.listing.tars[self.listing.tar[index]]
        return escape_path(tar + b"/" + self.listing.names[index])

    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        """Return the image as (C, H, W) uint8, a JPEG smaller where `jpeg_scale` allows.

        Raises:
            UnreadableImageError: It cannot be read, or its tar file cannot.
        """
        content = self.content(index)
        try:
            return decode(BytesIO(content), channels, jpeg_scale)
        except UnreadableImageError as broken:
            raise UnreadableImageError(self.name(index), broken.reason) from broken

    def content(self, index: int) -> bytes:
        """Return the member's bytes.

        Raises:
            UnreadableImageError: Its tar file cannot be read, or is too short.
        """
        path = self.root / os.fsdecode(self.listing.tars[self.listing.tar[index]])
        size = int(self.listing.size[index])
        try:
            content = self._open(path).read(size, int(self.listing.offset[index]))
        except OSError as error:
            raise UnreadableImageError(self.name(index), f"{escape_path(path.name)}: {error.strerror}") from error
        if len(content) < size:
            raise UnreadableImageError(self.name(index), f"{escape_path(path.name)} has become shorter")
        return content

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """Return a hash of all names and classes, of the sizes if wanted, and of the times of the shards."""
        listing = self.listing
        digest = hashlib.sha256(f"{listing.tars.fingerprint()} {listing.names.fingerprint()}".encode())
        digest.update(listing.tar.tobytes() + listing.number.tobytes())
        if sizes:
            digest.update(listing.size.tobytes())
        if times:
            changed = [(self.root / os.fsdecode(tar)).stat().st_mtime_ns for tar in listing.tars]
            digest.update(str(changed).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """Return the numbers of images, shards, ignored and damaged files in one line."""
        text = f"{len(self):,} images in {len(self.listing.tars):,} shards in {escape_path(self.root)}"
        text += f"; ignored: {format_counts(self.ignored)}" if self.ignored else ""
        return f"{text}; damaged shards: {self.damaged}" if self.damaged else text


def load_shards(root: Path) -> TarShardDataset:
    """Load the images of all `*.tar` files below a folder, sorted by path; links to folders are not followed.

    Shards written by `ssl-vit shard` have an index; others are indexed each time, on all cores.

    Raises:
        UserError: There is no such folder, no tar file or no image in it, or a compressed one.
    """
    if not root.is_dir():
        problem = "is a file; name the folder that it lies in" if root.exists() else "does not exist"
        raise UserError(f"{escape_path(root.absolute())} {problem}; data.source=shards wants a folder of .tar files")
    paths = _tar_files(root)
    tars = PackedPaths.from_iterable(os.fsencode(path.relative_to(root)) for path in paths)
    sizes = np.array([path.stat().st_size for path in paths], dtype=np.int64)
    manifest = read_manifest(root)
    classes = manifest.classes if manifest else []
    listing = read_listing(root, tars, sizes)
    if listing is not None:
        return TarShardDataset(root, listing, classes, ignored=Counter())
    listed = list(map_processes(index_tar, paths, label="listing shards", show=is_rank_zero()))
    ignored = sum((tar.ignored for tar in listed), Counter[str]())
    damaged = [
        f"{escape_path(path.relative_to(root))}: {tar.damage}"
        for path, tar in zip(paths, listed, strict=True)
        if tar.damage
    ]
    listing = concat_indices(tars, listed)
    if not len(listing.names):
        found = f"only {format_counts(ignored)}" if ignored else "and nothing else"
        raise UserError("\n  ".join([_without_images(root, len(paths), found), *_cut(damaged)]))
    if damaged and is_rank_zero():
        lines = [f"{len(damaged)} of {len(paths):,} shards are damaged; the samples before the damage are used"]
        log.warning("\n  ".join([*lines, *_cut(damaged)]))
    return TarShardDataset(root, listing, classes, ignored=ignored, damaged=len(damaged))


class _OpenTar:
    """A tar file that stays open until nobody holds it: not before a thread that reads from it has finished."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """So many bytes from there on; fewer at the end of the file."""
        return os.pread(self._descriptor, size, offset)


def _tar_files(root: Path) -> list[Path]:
    """Sorted by path."""
    found = [path for path in root.rglob("*.t[abgxz]*") if path.is_file() and not path.name.startswith(".")]
    if compressed := [path for path in found if _COMPRESSED_NAME.search(path.name)]:
        raise UserError(refusal(min(compressed)))
    tars = sorted((path for path in found if path.suffix == ".tar"), key=os.fsencode)
    if not tars:
        raise UserError(
            f"{escape_path(root.absolute())}: this folder contains no .tar file. Write some with "
            "`ssl-vit shard`, or read a folder of images with data.source=folder"
        )
    return tars


def _labels(number: Integers, classes: list[str]) -> tuple[Tensor, list[str]]:
    """Labels (N,) and the classes' names."""
    if number.min() < 0:
        return unlabeled(len(number))
    if number.max() < len(classes):
        return torch.from_numpy(number), classes
    present, label = np.unique(number, return_inverse=True)
    return torch.from_numpy(label), [str(one) for one in present]


def _without_images(root: Path, count: int, found: str) -> str:
    return f"{escape_path(root.absolute())}: there is no image in the {count:,} .tar files of this folder, {found}"


def _cut(lines: list[str]) -> list[str]:
    more = [f"... and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
    return [*lines[:_SHOWN], *more]
