"""Millions of paths packed into two arrays, without one Python object per path."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import eq
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ssl_vit.runtime.atomic_io import atomic_write

_CHUNK = 4096  # paths unpacked at once


@dataclass(eq=False)
class PackedPaths:
    """N paths of arbitrary bytes in order; forked processes share the arrays without copying."""

    text: npt.NDArray[np.uint8]  # all paths, concatenated
    ends: npt.NDArray[np.int64]  # (N + 1,) start of each path and, at N, the end of the last one

    @classmethod
    def from_iterable(cls, paths: Iterable[bytes]) -> PackedPaths:
        """Pack single paths, consumed one by one."""
        text, ends = bytearray(), array("q", [0])
        for path in paths:
            text += path
            ends.append(len(text))
        return cls(np.frombuffer(text, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    @classmethod
    def load(cls, file: Path) -> PackedPaths:
        """Load what `save` wrote. The file is read, not mapped: a mapped file on a network disk can kill its reader.

        Raises:
            OSError: It cannot be read.
            ValueError: It is damaged or of another kind.
        """
        try:
            arrays = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}") from None
        if arrays.keys() != {"text", "ends", "sha256"}:
            raise ValueError(f"{file} holds no names")
        paths = cls(arrays["text"], arrays["ends"])
        if paths.fingerprint() != arrays["sha256"].tobytes().hex():
            raise ValueError(f"{file}: its checksum is wrong")
        return paths

    def save(self, file: Path) -> None:
        """Write a safetensors file with the paths and their checksum.

        Raises:
            OSError: The disk is full, or `file` cannot be written.
        """
        checksum = np.frombuffer(bytes.fromhex(self.fingerprint()), dtype=np.uint8)
        with atomic_write(file) as output:
            output.write(save({"text": self.text, "ends": self.ends, "sha256": checksum}))

    def slice(self, start: int, stop: int) -> PackedPaths:
        """Return the paths from `start` up to `stop`; they share the text."""
        first, last = self.ends[start], self.ends[stop]
        return PackedPaths(self.text[first:last], self.ends[start : stop + 1] - first)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self.text[self.ends[index] : self.ends[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self), _CHUNK):
            ends = self.ends[start : start + _CHUNK + 1]
            text = self.text[ends[0] : ends[-1]].tobytes()
            for first, last in pairwise((ends - ends[0]).tolist()):
                yield text[first:last]

    def __eq__(self, other: object) -> bool:
        """Compare with packed paths or a list, in order."""
        return isinstance(other, PackedPaths | list) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the paths in order, in hexadecimal digits."""
        digest = hashlib.sha256(self.ends.data)
        digest.update(self.text.data)
        return digest.hexdigest()
