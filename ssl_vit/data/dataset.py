"""The interface of image datasets, subsets of them, and the log of unreadable images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock
from torch import Tensor

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


class ImageDataset(Protocol):
    """N images in a fixed order."""

    labels: Tensor  # (N,) int64, -1 where unknown
    classes: list[str]  # names of the labels; empty without labels

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the image's relative path as one line of printable text."""
        ...

    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        """Decode the image to (C, H, W) uint8, gray for 1 channel and RGB for 3; smaller as `jpeg_scale` allows.

        Raises:
            UnreadableImageError: It cannot be read.
        """
        ...

    def content(self, index: int) -> bytes:
        """Return the encoded image.

        Raises:
            UnreadableImageError: It cannot be read.
        """
        ...

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """Return a hash that changes when images are added, removed or renamed.

        Args:
            sizes: Include file sizes, which takes one system call per file.
            times: Include modification times; the hash then identifies this copy of the files.
        """
        ...

    def describe(self) -> str:
        """Return one line: the number and kinds of images, and what was ignored."""
        ...


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
        with FileLock(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a+b") as file:
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


class Subset:
    """The images of a dataset at `indices` (M,)."""

    def __init__(self, dataset: ImageDataset, indices: Tensor) -> None:
        self.dataset = dataset
        self.indices = indices
        self.labels = dataset.labels[indices]
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return the image's name in the dataset."""
        return self.dataset.name(int(self.indices[index]))

    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        """Decode the image; see `ImageDataset.read`."""
        return self.dataset.read(int(self.indices[index]), channels, jpeg_scale)

    def content(self, index: int) -> bytes:
        """Return the encoded image."""
        return self.dataset.content(int(self.indices[index]))

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """Hash the dataset's fingerprint and the indices."""
        digest = hashlib.sha256(self.dataset.fingerprint(sizes=sizes, times=times).encode())
        digest.update(self.indices.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """Return the size of the subset and the dataset's description."""
        return f"{len(self):,} of {self.dataset.describe()}"
