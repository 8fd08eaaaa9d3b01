"""Similarity of layers: streaming linear centered kernel alignment (CKA), and its figures."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.visualization.image_grid import TitledFigure
from ssl_vit.visualization.plots import plot_matrices

MINIBATCH = 256  # images, as Nguyen et al. 2021
MIN_IMAGES = 4  # for which the unbiased estimate is defined


class LinearCKA:
    """Linear CKA between all pairs of layers, in memory independent of the number of images.

    CKA (Kornblith et al. 2019, arXiv 1905.00414, section 3) is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the linear
    kernels K = X Xᵀ, L = Y Yᵀ. Each HSIC is the mean of unbiased estimates over minibatches (Nguyen et al. 2021, arXiv
    2010.15327): with the biased estimate, layers of more dimensions than images would all look alike. A last incomplete
    minibatch is weighted by its number of images if it has at least four.
    """

    def __init__(self, minibatch: int = MINIBATCH) -> None:
        self.minibatch = minibatch
        self._pending: list[Tensor] = []  # (n, D) per layer, n below the minibatch
        self._sum: Tensor | float = 0.0  # (layers, layers) of estimates times their images

    def update(self, layers: list[Tensor]) -> None:
        """Add the features (B, D) of the same images in every layer; D may differ between layers."""
        self._pending = [torch.cat(pair) for pair in zip(self._pending or [x[:0] for x in layers], layers, strict=True)]
        while len(self._pending[0]) >= self.minibatch:
            self._sum = self._sum + self.minibatch * unbiased_hsic([x[: self.minibatch] for x in self._pending])
            self._pending = [x[self.minibatch :] for x in self._pending]

    def compute(self) -> Tensor | None:
        """Return (layers, layers) float32, NaN for a layer with constant features; None for too few images."""
        total = self._sum
        rest = len(self._pending[0]) if self._pending else 0
        if rest >= MIN_IMAGES:
            total = total + rest * unbiased_hsic(self._pending)
        if not isinstance(total, Tensor):
            return None
        own = total.diagonal()
        own = torch.where(own > 0, own, torch.nan).sqrt()
        return (total / (own[:, None] * own)).float()


def unbiased_hsic(layers: list[Tensor]) -> Tensor:
    """Estimate the HSIC (layers, layers) of features (n, D) with linear kernels, for n of at least 4.

    With zeros on the diagonals of K and L: (tr(K L) + 1ᵀK1 1ᵀL1 / ((n-1)(n-2)) - 2 1ᵀKL1 / (n-2)) / (n (n-3)) (Song et
    al. 2012, Feature selection via dependence maximization; HSIC_1 of Nguyen et al. 2021).
    """
    n = len(layers[0])
    centered = [layer.double() - layer.double().mean(0) for layer in layers]  # affects only the rounding
    kernels = torch.stack([layer @ layer.T for layer in centered])  # (layers, n, n)
    kernels.diagonal(dim1=-2, dim2=-1).zero_()
    sums = kernels.sum(-1)  # (layers, n)
    totals = sums.sum(-1)
    traces = kernels.flatten(1) @ kernels.flatten(1).T
    return (traces + totals.outer(totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums @ sums.T) / (n * (n - 3))


def layers_figure(own: Tensor, random: Tensor | None, num_images: int) -> TitledFigure:
    """Draw the CKA (blocks, blocks) between the layers of a model, and with those of its random-init model, if any."""
    plots = [("model and itself", own, "block", "block")]
    if random is not None:
        plots.append(("model and random init", random, "block", "block of random init"))
    text = (
        f"Similarity of the features of {num_images:,} images in the blocks: 1 is equal up to rotation and scale, 0 is "
        "unrelated. Bright squares along the diagonal are stages of blocks that change little. Features are mean patch "
        "tokens after each block; the estimate is unbiased, so that values a little below 0 are possible."
    )
    if random is not None:
        text += " Similarity to random weights comes from the images, not from training."
    return TitledFigure("Similarity of the layers (linear CKA)", plot_matrices(plots, "CKA"), text)


def comparison_figure(cka: Tensor, other: str, num_images: int) -> TitledFigure:
    """Draw the CKA between the layers of two models (blocks of the model, blocks of the other)."""
    text = (
        f"Similarity of the features of {num_images:,} images in the blocks of two models: 1 is equal up to rotation "
        f"and scale, 0 is unrelated. Rows are this model, columns {other}. A bright diagonal means that both models "
        "process images in similar stages. Features are mean patch tokens after each block; the estimate is unbiased."
    )
    image = plot_matrices([("", cka, "block", f"block of {other}")], "CKA")
    return TitledFigure("Similarity to another model (linear CKA)", image, text)
