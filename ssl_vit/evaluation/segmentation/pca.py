"""Principal components of the patch tokens of many images and the foreground that they separate."""

from __future__ import annotations

from collections.abc import Iterable
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


def fit_pca(images: Iterable[LastBlockFeatures]) -> PCABasis:
    """Compute the first three principal components of the patches of all images, in one pass, in float64.

    Means and scatters of the images merge as in Chan et al. 1983. An eigenvector has no sign of its own: each component
    points away from the mean token of the images' borders, which are mostly background, so that foreground is where it
    is positive. One on which the borders' mean is zero keeps the sign that makes its largest entry positive.

    Raises:
        UserError: There is no image.
    """
    count = border_count = 0
    mean = scatter = border = torch.zeros(())  # (D,), (D, D) sum of products of deviations, (D,) sum over the borders
    for features in images:
        tokens = features.patches.flatten(0, 1).double()  # (N, D)
        own_mean, total = tokens.mean(0), count + len(tokens)
        apart, centered = own_mean - mean, tokens - own_mean
        scatter = scatter + centered.T @ centered + torch.outer(apart, apart) * (count * len(tokens) / total)
        mean = mean + apart * (len(tokens) / total)
        count = total
        outermost = torch.ones(features.patches.shape[:2], dtype=torch.bool)
        outermost[1:-1, 1:-1] = False
        at_border = tokens[outermost.flatten()]
        border, border_count = border + at_border.sum(0), border_count + len(at_border)
    if not count:
        raise UserError("pca needs at least one image from which to find its components")
    variances, vectors = torch.linalg.eigh(scatter / count)  # ascending
    components = vectors.T.flip(0)[:COMPONENTS]
    std = variances.flip(0)[:COMPONENTS].clamp_min(0).sqrt()
    along_border = components @ (border / border_count - mean)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))[:, 0]
    components = components * torch.where(along_border == 0, largest.sign(), -along_border.sign())[:, None]
    tokens_size = (mean.square().sum() + variances.sum().clamp_min(0)).sqrt()
    flat = std <= _MIN_STD * tokens_size
    return PCABasis(mean, components.masked_fill(flat[:, None], 0), std.masked_fill(flat, 1))


def pca_segmenter(basis: PCABasis) -> Segmenter:
    """Return a segmenter by the first component of a basis.

    The score map is the component, in standard deviations over all images; the mask is where it is above zero, which is
    the mean over all images' patches. It may have several parts, or none.
    """

    def segment(features: LastBlockFeatures) -> Segmentation:
        scores = basis.project(features.patches)[0]
        return Segmentation(scores, scores > 0)

    return segment
