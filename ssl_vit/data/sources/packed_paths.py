"""Names of images by the million: packed into two arrays, without a Python object per name."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import pairwise
from operator import eq
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ssl_vit.runtime.atomic_io import atomic_write

_AT_ONCE = 4096  # names unpacked in one go


class PackedPaths:
    """N names of any bytes, in an order; forked processes share the arrays without copying.

    Args:
        text: All names, one behind the other, uint8.
        ends: Where each name starts and, at N, the last one ends (N + 1,) int64.
    """

    def __init__(self, text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.text = text
        self.ends = ends

    @classmethod
    def from_iterable(cls, names: Iterable[bytes]) -> PackedPaths:
        """From single names, taken one after the other."""
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += name
            ends.append(len(text))
        return cls(np.frombuffer(text, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    @classmethod
    def load(cls, path: Path) -> PackedPaths:
        """What `save` wrote. It is read, not mapped: mapped files on model disks can kill their readers.

        Raises:
            OSError: It cannot be read.
            ValueError: It is damaged, or another kind of file.
        """
        try:
            arrays = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None
        if arrays.keys() != {"text", "ends", "sha256"}:
            raise ValueError(f"{path} holds no names")
        names = cls(arrays["text"], arrays["ends"])
        if names.fingerprint() != arrays["sha256"].tobytes().hex():
            raise ValueError(f"{path}: its checksum is wrong")
        return names

    def save(self, path: Path) -> None:
        """Write a safetensors file with the names and their checksum.

        Raises:
            OSError: The disk is full, or `path` cannot be written to.
        """
        checksum = np.frombuffer(bytes.fromhex(self.fingerprint()), dtype=np.uint8)
        with atomic_write(path) as file:
            file.write(save({"text": self.text, "ends": self.ends, "sha256": checksum}))

    def slice(self, start: int, stop: int) -> PackedPaths:
        """The names from `start` up to `stop`; they share the text of these."""
        first, last = self.ends[start], self.ends[stop]
        return PackedPaths(self.text[first:last], self.ends[start : stop + 1] - first)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self.text[self.ends[index] : self.ends[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self), _AT_ONCE):
            ends = self.ends[start : start + _AT_ONCE + 1]
            text = self.text[ends[0] : ends[-1]].tobytes()
            places = (ends - ends[0]).tolist()
            for first, last in pairwise(places):
                yield text[first:last]

    def __eq__(self, other: object) -> bool:
        """Whether the other, packed or a list, holds the same names in the same order."""
        return isinstance(other, PackedPaths | list) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def fingerprint(self) -> str:
        """SHA-256 of the names in their order, in hexadecimal digits."""
        digest = hashlib.sha256(self.ends.data)
        digest.update(self.text.data)
        return digest.hexdigest()
