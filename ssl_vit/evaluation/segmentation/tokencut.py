"""TokenCut (Wang et al. 2022, arXiv 2202.11539): the object is one side of the normalized cut of the patch graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.linalg import blas, eigh
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from ssl_vit.evaluation.segmentation.patch_mask import Segmentation, concatenated_keys, connected_component
from ssl_vit.models.attention_maps import LastBlockFeatures

TAU = 0.2  # cosine above which two patches are joined (tau)
EPS = 1e-5  # weight between patches that are not joined
_SMALL = 64  # patches up to which the dense solver is used
_ROWS = 512  # of the cosines that are computed at once
_TIE = 1e-6  # relative: closer values are equal but for rounding

Vector = npt.NDArray[np.float64]


def tokencut_mask(features: LastBlockFeatures) -> Segmentation:
    """Segment an image by TokenCut, from the keys of the last block, each patch's scaled to length 1.

    Two patches are joined with weight 1 where their cosine exceeds 0.2, all others with 1e-5: the graph A with degrees
    D. The eigenvector of (D - A) y = λ D y with the second smallest λ is split at its mean. The side with the largest
    absolute value is the object's, of which the part connected with that patch is kept (sides, not corners). The score
    map is the eigenvector minus its mean, positive on the object's side, divided by its largest absolute value.

    Among equal absolute values (to 1e-6, relative) the first, row by row, decides. Where all patches are joined, or no
    two are, no cut is better than another: an empty mask, as with a single patch.
    """
    graph = _Graph(concatenated_keys(features))
    if graph.is_uniform():
        nothing = torch.zeros(features.keys.shape[1:3])
        return Segmentation(nothing, nothing > 0)
    vector = graph.second_eigenvector()
    size = np.abs(vector)
    seed = int(np.argmax(size >= (1 - _TIE) * size.max()))
    centered = (vector - vector.mean()) * (1.0 if vector[seed] > vector.mean() else -1.0)
    scores = torch.from_numpy(centered / np.abs(centered).max()).view(features.keys.shape[1:3])
    return Segmentation(scores.float(), connected_component(scores > 0, seed))


class _Graph:
    """Graph of N patches, stored as the packed lower half of the matrix B of joined pairs: A = 1e-5 + (1 - 1e-5) B.

    This takes half the memory of a float64 matrix: 225 MB for 7,500 patches. The keys are (N, D).
    """

    def __init__(self, keys: Tensor) -> None:
        unit = F.normalize(keys, dim=-1)
        self.count = n = len(unit)
        self.joined = np.empty(n * (n + 1) // 2)  # row by row: B[0, 0], B[1, 0], B[1, 1], B[2, 0], ...
        for start in range(0, n, _ROWS):
            alike = (unit[start : start + _ROWS] @ unit[: start + _ROWS].T > TAU).numpy()
            for row, values in enumerate(alike, start):
                self.joined[row * (row + 1) // 2 :][: row + 1] = values[: row + 1]
        self.degrees: Vector = self.times(np.ones(n))

    def times(self, vector: Vector) -> Vector:
        """Multiply A by a vector (N,)."""
        product: Vector = blas.dspmv(self.count, 1 - EPS, self.joined, vector)
        product += EPS * vector.sum()
        return product

    def is_uniform(self) -> bool:
        """Return whether all pairs of patches are joined, or none."""
        rows = np.arange(self.count)
        pairs = self.joined.sum() - np.count_nonzero(self.joined[rows * (rows + 3) // 2])  # without the diagonal
        return pairs in (0, self.count * (self.count - 1) // 2)

    def second_eigenvector(self) -> Vector:
        """Compute the y (N,) of (D - A) y = λ D y with the second smallest λ; N is at least 2.

        With y = D^-1/2 z it is the z of D^-1/2 A D^-1/2 with the second largest eigenvalue. The largest is 1, of
        D^1/2 1, which is subtracted: Lanczos' method then finds one vector, from products with A alone.
        """
        root = np.sqrt(self.degrees)
        first = root / np.linalg.norm(root)

        def multiply(z: Vector) -> Vector:
            product: Vector = self.times(z / root) / root - first * (first @ z)
            return product

        n = self.count
        if n <= _SMALL:
            _, vectors = eigh(np.stack([multiply(column) for column in np.eye(n)]), subset_by_index=(n - 1, n - 1))
        else:
            random = np.random.default_rng(0)
            operator = LinearOperator((n, n), matvec=multiply, dtype=np.float64)
            _, vectors = eigsh(operator, k=1, which="LA", v0=random.standard_normal(n), rng=random)
        result: Vector = vectors[:, 0] / root
        return result
