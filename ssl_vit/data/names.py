"""Names of pictures by the million: packed into two arrays, without a Python object per name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt


class Names:
    """N names of any bytes, in an order; forked processes share the arrays without copying.

    Args:
        text: All names, one behind the other, uint8.
        ends: Where each name starts and, at N, the last one ends (N + 1,) int64.
    """

    def __init__(self, text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.text = text
        self.ends = ends

    @classmethod
    def pack(cls, names: Iterable[bytes]) -> Names:
        """From single names."""
        listed = list(names)
        ends = np.cumsum([0, *map(len, listed)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(listed), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.ends[index] : self.ends[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))

    def fingerprint(self) -> str:
        """SHA-256 of the names in their order, in hexadecimal digits."""
        digest = hashlib.sha256(self.ends.tobytes())
        digest.update(self.text.tobytes())
        return digest.hexdigest()
