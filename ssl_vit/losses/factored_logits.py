"""Logits over many prototypes, kept as factors and multiplied out a few columns at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ssl_vit.runtime.device import upcast

_ENTRIES = {"cpu": 1 << 19}  # of a block: what fits a core's cache
_ENTRIES_ELSEWHERE = 1 << 26  # 256 MiB of a GPU's memory
_FEWEST_COLUMNS = 256


class FactoredLogits(NamedTuple):
    """The logits (N, K) = z vᵀ · scale. Multiplied out they may well be larger than all activations of the model."""

    z: Tensor  # (N, D), in the number format to multiply in
    v: Tensor  # (K, D), likewise
    scale: Tensor  # (K,) float32 or more

    def columns(self, part: slice) -> Tensor:
        """The logits (N, k) of some prototypes, in float32 or more."""
        return upcast(self.z @ self.v[part].T) * self.scale[part]

    def blocks(self) -> Iterator[slice]:
        """All prototypes, in blocks that are large enough to compute well and small enough to hold."""
        entries = _ENTRIES.get(self.z.device.type, _ENTRIES_ELSEWHERE)
        width = max(_FEWEST_COLUMNS, entries // len(self.z))
        return (slice(start, start + width) for start in range(0, len(self.v), width))
