"""Logits over many prototypes, kept as factors and multiplied out block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ssl_vit.runtime.device import upcast

_BLOCK_SIZE = {"cpu": 1 << 19}  # entries of a block, which fit a core's cache
_DEFAULT_BLOCK_SIZE = 1 << 26  # 256 MiB of a GPU's memory
_MIN_COLUMNS = 256


class FactoredLogits(NamedTuple):
    """Logits (N, K) = z vᵀ · scale, which multiplied out may need more memory than all activations of the model."""

    z: Tensor  # (N, D), in the dtype of the product
    v: Tensor  # (K, D), in the same dtype
    scale: Tensor  # (K,) float32 or more

    def block(self, columns: slice) -> Tensor:
        """Compute the logits (N, k) of some prototypes, in float32 or float64."""
        return upcast(self.z @ self.v[columns].T) * self.scale[columns]

    def blocks(self) -> Iterator[slice]:
        """Yield slices of the prototypes, in blocks of a size that computes fast and fits in memory."""
        size = _BLOCK_SIZE.get(self.z.device.type, _DEFAULT_BLOCK_SIZE)
        width = max(_MIN_COLUMNS, size // len(self.z))
        return (slice(start, start + width) for start in range(0, len(self.v), width))
