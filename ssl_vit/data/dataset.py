"""What a dataset is to the rest of the code, and the list of those that could not be read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock
from torch import Tensor

# Told an image's upright height and width in pixels: by which of 1, 2, 4, 8 it may be decoded smaller. It is asked
# only where that is done; the decoded image's height is then ceil(height / answer), its width likewise.
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
    classes: list[str]  # the labels' names; empty where there are none

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How reports call the image: its relative path, as one line of printable text."""
        ...

    def read(self, index: int, channels: int, shrink: JPEGScaleFn | None = None) -> Tensor:
        """The image as (C, H, W) uint8, gray for 1 channel and RGB for 3; decoded smaller where that saves time.

        Raises:
            UnreadableImageError: It cannot be read.
        """
        ...

    def content(self, index: int) -> bytes:
        """The image as it is stored, not decoded.

        Raises:
            UnreadableImageError: It cannot be read.
        """
        ...

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """A hash that changes when images are added, removed or renamed.

        Args:
            sizes: Whether it changes, too, when a file is replaced by one of another size; this asks for each.
            times: Whether it changes, too, when a file is written to; then it is of this copy of the files alone.
        """
        ...

    def describe(self) -> str:
        """One line: how many images of which kind, and what was ignored beside them."""
        ...


class SkippedImageLog:
    """The images that could not be read, one line each, whichever process came upon them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listed: set[str] = set()  # names known to stand in the file
        self._known_bytes = 0  # of the file, that `_listed` covers

    def record(self, broken: UnreadableImageError) -> None:
        """Add the image, unless this or another process has listed it already."""
        if broken.name in self._listed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a+b") as file:
            file.seek(self._known_bytes)
            self._listed |= {line.partition("\t")[0] for line in file.read().decode().splitlines()}
            if broken.name not in self._listed:
                file.write(f"{broken.name}\t{broken.reason}\n".encode())
                self._listed.add(broken.name)
            self._known_bytes = file.tell()

    def count(self) -> int:
        """How many images are listed."""
        return len(self.path.read_text(encoding="utf-8").splitlines()) if self.path.exists() else 0


def escape_path(name: str | bytes | Path) -> str:
    r"""Any file name as one line of valid text; what cannot be shown stands as an escape.

    Example:
        >>> printable(b"caf\xe9\n1.jpg")
        'caf\\xe9\\n1.jpg'
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def evenly_spaced(count: int, most: int) -> Tensor:
    """At most so many of `count` places (M,) int64, evenly spread and ascending.

    Example:
        >>> evenly(9, 3).tolist()
        [1, 4, 7]
    """
    some = min(count, most)
    places: Tensor = (2 * torch.arange(some) + 1) * count // (2 * some)
    return places


class Subset:
    """Some images of a larger set, by their places (M,) in it."""

    def __init__(self, dataset: ImageDataset, places: Tensor) -> None:
        self.dataset = dataset
        self.places = places
        self.labels = dataset.labels[places]
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """As in the larger set."""
        return self.dataset.name(int(self.places[index]))

    def read(self, index: int, channels: int, shrink: JPEGScaleFn | None = None) -> Tensor:
        """As in the larger set."""
        return self.dataset.read(int(self.places[index]), channels, shrink)

    def content(self, index: int) -> bytes:
        """As in the larger set."""
        return self.dataset.content(int(self.places[index]))

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """Of the larger set and the places."""
        digest = hashlib.sha256(self.dataset.fingerprint(sizes=sizes, times=times).encode())
        digest.update(self.places.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """How many of the larger set."""
        return f"{len(self):,} of {self.dataset.describe()}"
