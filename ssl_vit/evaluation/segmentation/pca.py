"""The main directions in which patches of many images differ: an object against its surroundings, and colors."""

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
RANGE = 2.3  # standard deviations at which colors saturate, as in CAPI (Darcet et al. 2025)
_NO_SPREAD = 1e-6  # relative: a component with less spread is rounding


class Basis(NamedTuple):
    """The first principal components of patch tokens, common to many images."""

    mean: Tensor  # (D,) float64
    components: Tensor  # (3, D) float64, of unit length and fixed sign; zero where the tokens do not spread
    spread: Tensor  # (3,) float64: standard deviation along each

    def project(self, patches: Tensor) -> Tensor:
        """Patch tokens (rows, columns, D) along the components (3, rows, columns) float32, in standard deviations."""
        along = (patches.double() - self.mean) @ self.components.T / self.spread
        return along.movedim(-1, 0).float()


class PatchStatistics:
    """Mean and covariance of patch tokens, updated image by image in constant memory, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())  # (D,)
        self.scatter = torch.zeros(())  # (D, D): sum of the outer products of deviations from the mean
        self.border = torch.zeros(())  # (D,): sum of the tokens at the images' borders
        self.border_count = 0

    def add(self, patches: Tensor) -> None:
        """Take in one image's tokens (rows, columns, D); means and scatters merge as in Chan et al. 1983."""
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

    def basis(self) -> Basis:
        """The first three principal components; each points away from the mean token of the images' borders.

        An eigenvector has no sign of its own. What lies at the border of an image is background more often than not,
        so that the object is where components are positive. A component on which the borders' mean is zero keeps the
        sign that makes its largest entry positive.

        Raises:
            UserError: No image was taken in.
        """
        if not self.count:
            raise UserError("pca needs at least one image from which to find its components")
        variances, vectors = torch.linalg.eigh(self.scatter / self.count)  # ascending
        components = vectors.T.flip(0)[:COMPONENTS]
        spread = variances.flip(0)[:COMPONENTS].clamp_min(0).sqrt()
        components = components * _signs(components, self.border / self.border_count - self.mean)[:, None]
        tokens_size = (self.mean.square().sum() + variances.sum().clamp_min(0)).sqrt()
        flat = spread <= _NO_SPREAD * tokens_size
        return Basis(self.mean, components.masked_fill(flat[:, None], 0), spread.masked_fill(flat, 1))


def fit_basis(sights: Iterable[LastBlockFeatures]) -> Basis:
    """The components of the patches of all these images together; one pass, one image at a time.

    Raises:
        UserError: There is no image.
    """
    statistics = PatchStatistics()
    for sight in sights:
        statistics.add(sight.patches)
    return statistics.basis()


def pca_segmenter(basis: Basis) -> Segmenter:
    """A segmenter by the first component of a basis.

    `soft` is the component, in standard deviations over all images; the mask is where it is above zero, which is the
    mean over all images' patches. It may have several parts, or none.
    """
    return partial(_segment, basis)


def _segment(basis: Basis, sight: LastBlockFeatures) -> Segmentation:
    soft = basis.project(sight.patches)[0]
    return Segmentation(soft, soft > 0)


def colors(basis: Basis, patches: Tensor) -> Tensor:
    """The three components of an image's patch tokens (rows, columns, D) as red, green and blue.

    Of one basis, equal colors mean equal tokens in all images. The tokens' mean is gray; each color saturates at
    2.3 standard deviations over all images.

    Returns:
        (rows, columns, 3) float32, 0 to 1.
    """
    return (basis.project(patches) / RANGE).clamp(-1, 1).movedim(0, -1) / 2 + 0.5


def _border(rows: int, columns: int) -> Tensor:
    """The outermost patches (rows, columns) bool of a grid."""
    border = torch.ones(rows, columns, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border


def _signs(components: Tensor, border: Tensor) -> Tensor:
    """Signs (3,) with which components (3, D) point away from the borders' deviation (D,) from the mean."""
    along = components @ border
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(along == 0, largest.sign(), -along.sign())
