"""Principal components of the patch tokens of many images and the foreground that they separate."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.evaluation.segmentation.patch_mask import Segmentation, Segmenter
from ssl_vit.models.attention_maps import LastBlockFeatures
from ssl_vit.runtime.errors import UserError

COMPONENTS = 3
_MIN_STD = 1e-6  # relative: a component with less is rounding


class PCABasis(NamedTuple):
    """The first principal components of patch tokens, shared by many images."""

    mean: Tensor  # (D,) float64
    components: Tensor  # (3, D) float64, of unit length and fixed sign; zero where the tokens do not vary
    std: Tensor  # (3,) float64: standard deviation along each

    def project(self, patches: Tensor) -> Tensor:
        """Project patch tokens (rows, columns, D) onto the components: (3, rows, columns) float32, of unit variance."""
        along = (patches.double() - self.mean) @ self.components.T / self.std
        return along.movedim(-1, 0).float()


class PatchStatistics:
    """Streaming mean and covariance of patch tokens, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())  # (D,)
        self.scatter = torch.zeros(())  # (D, D): sum of the outer products of deviations from the mean
        self.border = torch.zeros(())  # (D,): sum of the tokens at the images' borders
        self.border_count = 0

    def update(self, patches: Tensor) -> None:
        """Add one image's tokens (rows, columns, D); means and scatters merge as in Chan et al. 1983."""
        tokens = patches.flatten(0, 1).double()  # (N, D)
        at_border = tokens[_border(patches.shape[0], patches.shape[1]).flatten()]
        mean = tokens.mean(0)
        total = self.count + len(tokens)
        apart = mean - self.mean
        self.scatter = (
            self.scatter
            + (tokens - mean).T @ (tokens - mean)
            + torch.outer(apart, apart) * (self.count * len(tokens) / total)
        )
        self.mean = self.mean + apart * (len(tokens) / total)
        self.count = total
        self.border = self.border + at_border.sum(0)
        self.border_count += len(at_border)

    def compute(self) -> PCABasis:
        """Compute the first three principal components; each points away from the mean token of the images' borders.

        An eigenvector has no sign of its own. The border of an image is mostly background, so that foreground is where
        components are positive. A component on which the borders' mean is zero keeps the
        sign that makes its largest entry positive.

        Raises:
            UserError: No image was added.
        """
        if not self.count:
            raise UserError("pca needs at least one image from which to find its components")
        variances, vectors = torch.linalg.eigh(self.scatter / self.count)  # ascending
        components = vectors.T.flip(0)[:COMPONENTS]
        std = variances.flip(0)[:COMPONENTS].clamp_min(0).sqrt()
        components = components * _signs(components, self.border / self.border_count - self.mean)[:, None]
        tokens_size = (self.mean.square().sum() + variances.sum().clamp_min(0)).sqrt()
        flat = std <= _MIN_STD * tokens_size
        return PCABasis(self.mean, components.masked_fill(flat[:, None], 0), std.masked_fill(flat, 1))


def fit_pca(images: Iterable[LastBlockFeatures]) -> PCABasis:
    """Compute the components of the patches of all images in one pass.

    Raises:
        UserError: There is no image.
    """
    statistics = PatchStatistics()
    for features in images:
        statistics.update(features.patches)
    return statistics.compute()


def pca_segmenter(basis: PCABasis) -> Segmenter:
    """Return a segmenter by the first component of a basis.

    The score map is the component, in standard deviations over all images; the mask is where it is above zero, which is
    the mean over all images' patches. It may have several parts, or none.
    """
    return partial(_segment, basis)


def _segment(basis: PCABasis, features: LastBlockFeatures) -> Segmentation:
    scores = basis.project(features.patches)[0]
    return Segmentation(scores, scores > 0)


def _border(rows: int, columns: int) -> Tensor:
    """Return the outermost patches (rows, columns) bool of a grid."""
    border = torch.ones(rows, columns, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border


def _signs(components: Tensor, border: Tensor) -> Tensor:
    """Return the signs (3,) with which components (3, D) point away from the borders' deviation (D,) from the mean."""
    along = components @ border
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(along == 0, largest.sign(), -along.sign())
