"""The base class of image datasets, selections of their images, and the log of unreadable ones."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ssl_vit.config.types import AUTO_RANGE, ValueRange
from ssl_vit.runtime.atomic_io import lock_file
from ssl_vit.runtime.workers import map_threads

# Maps an image's upright height and width in pixels to the factor 1, 2, 4 or 8 by which it may be decoded smaller.
# Called for JPEGs only; the decoded height is then ceil(height / factor), the width likewise.
JPEGScaleFn = Callable[[int, int], int]


class UnreadableImageError(Exception):
    """An image that cannot be read."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class ImageDataset(ABC):
    """N images in a fixed order."""

    labels: Tensor  # (N,) int64, -1 where unknown
    classes: list[str]  # names of the labels; empty without labels
    value_range: ValueRange = AUTO_RANGE  # of images with more than 8 bits, signed values or floats

    def __len__(self) -> int:
        return len(self.labels)

    def with_range(self, value_range: ValueRange) -> Self:
        """Set the range of values, in place, and return the dataset."""
        self.value_range = value_range
        return self

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the image's relative path as one line of printable text."""

    @abstractmethod
    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        """Decode the image to (C, H, W) uint8, gray for 1 channel and RGB for 3; smaller as `jpeg_scale` allows.

        Raises:
            UnreadableImageError: It cannot be read.
        """

    @abstractmethod
    def content(self, index: int) -> bytes:
        """Return the encoded image.

        Raises:
            UnreadableImageError: It cannot be read.
        """

    @abstractmethod
    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """Return a hash that changes when images are added, removed or renamed.

        Args:
            sizes: Include file sizes, which takes one system call per file.
            times: Include modification times; the hash then identifies this copy of the files.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return one line: the number and kinds of images, and what was ignored."""


class Subset(ImageDataset):
    """The images of a dataset at `indices` (M,)."""

    def __init__(self, dataset: ImageDataset, indices: Tensor) -> None:
        self.dataset = dataset
        self.indices = indices
        self.value_range = dataset.value_range
        self.labels = dataset.labels[indices]
        self.classes = dataset.classes

    def with_range(self, value_range: ValueRange) -> Self:
        self.dataset.with_range(value_range)
        return super().with_range(value_range)

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))

    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        return self.dataset.read(int(self.indices[index]), channels, jpeg_scale)

    def content(self, index: int) -> bytes:
        return self.dataset.content(int(self.indices[index]))

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        digest = hashlib.sha256(self.dataset.fingerprint(sizes=sizes, times=times).encode())
        digest.update(self.indices.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        return f"{len(self):,} of {self.dataset.describe()}"


class SkippedImageLog:
    """A text file with one line per unreadable image, shared by all processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._logged: set[str] = set()  # names in the first `_bytes_read` bytes of the file
        self._bytes_read = 0

    def record(self, error: UnreadableImageError) -> None:
        """Append the image, unless this or another process has logged it already."""
        if error.name in self._logged:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a+b") as file:
            file.seek(self._bytes_read)
            self._logged |= {line.partition("\t")[0] for line in file.read().decode().splitlines()}
            if error.name not in self._logged:
                file.write(f"{error.name}\t{error.reason}\n".encode())
                self._logged.add(error.name)
            self._bytes_read = file.tell()

    def count(self) -> int:
        """Return the number of logged images."""
        return len(self.path.read_text(encoding="utf-8").splitlines()) if self.path.exists() else 0


def escape_path(name: str | bytes | Path) -> str:
    r"""Format any file name as one line of valid text, with escapes for unprintable characters.

    Example:
        >>> escape_path(b"caf\xe9\n1.jpg")
        'caf\\xe9\\n1.jpg'
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def evenly_spaced(count: int, most: int) -> Tensor:
    """Return at most `most` of the indices 0, ..., count - 1, evenly spaced and ascending, (M,) int64.

    Example:
        >>> evenly_spaced(9, 3).tolist()
        [1, 4, 7]
    """
    length = min(count, most)
    indices: Tensor = (2 * torch.arange(length) + 1) * count // (2 * length)
    return indices


class ClassBalancedOrder(NamedTuple):
    """M labeled images: the first of each class, then the second of each class, and so on."""

    indices: Tensor  # (M,) int64
    rank: Tensor  # (M,) int64, ascending: the number of earlier images of the same class
    class_size: Tensor  # (M,) int64: the number of images of the same class


def class_balanced_order(labels: Tensor, *, seed: int) -> ClassBalancedOrder:
    """Order the images with labels (N,) >= 0: random within each class, and random classes within each rank.

    Example:
        >>> labels = torch.tensor([7, 7, 7, 7, 3, 3, -1])
        >>> order = class_balanced_order(labels, seed=0)
        >>> labels[order.indices].bincount(minlength=8)[[3, 7]].tolist()
        [2, 4]
        >>> order.rank.tolist()
        [0, 0, 1, 1, 2, 3]
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order] >= 0]
    _, classes, sizes = torch.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = classes.argsort(stable=True)  # indices into `order`
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[classes[by_class]]
    by_rank = rank.argsort(stable=True)
    return ClassBalancedOrder(order[by_rank], rank[by_rank], sizes[classes][by_rank])


def exact_duplicates(dataset: ImageDataset, other: ImageDataset, pairs: Tensor) -> Tensor:
    """Return those of the pairs (P, 2) int64 of indices into `dataset` and `other` that are equal byte for byte.

    Only the images in the pairs are read, each once. An unreadable image equals no other.
    """
    first, second = _digests(dataset, pairs[:, 0]), _digests(other, pairs[:, 1])
    same = [first[a] is not None and first[a] == second[b] for a, b in pairs.tolist()]
    return pairs[torch.tensor(same, dtype=torch.bool)]


def _digests(dataset: ImageDataset, indices: Tensor) -> dict[int, bytes | None]:
    """Hash the content of each image; None if it cannot be read."""
    unique = torch.unique(indices).tolist()

    def digest(position: int) -> bytes | None:
        try:
            return hashlib.sha256(dataset.content(unique[position])).digest()
        except UnreadableImageError:
            return None

    return dict(zip(unique, map_threads(digest, len(unique), label="comparing duplicates", show=True), strict=True))
