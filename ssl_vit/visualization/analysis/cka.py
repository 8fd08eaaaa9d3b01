"""Which layers say the same: linear centerd kernel alignment (CKA), of features that come a few images at a time."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from ssl_vit.visualization.image_grid import TitledFigure
from ssl_vit.visualization.plots import square_maps

MINIBATCH = 256  # images; as Nguyen et al. 2021
FEWEST = 4  # that the unbiased estimate is defined for


class LinearCKA:
    """Linear CKA between all of several layers, in memory that does not grow with the number of images.

    CKA (Kornblith et al. 2019, arXiv 1905.00414, section 3) is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the linear
    kernels K = X Xᵀ, L = Y Yᵀ. Each HSIC is the mean of unbiased estimates over minibatches (Nguyen et al. 2021, arXiv
    2010.15327): with the biased one, layers of more dimensions than images would all look alike.
    What is left over at the end counts by its number of images, if these are four or more.

    Args:
        minibatch: Images that an estimate is made of; all of them, if there are no more than that.
    """

    def __init__(self, minibatch: int = MINIBATCH) -> None:
        self.minibatch = minibatch
        self._waiting: list[Tensor] = []  # per layer (n, D), n below the minibatch
        self._sum: Tensor | float = 0.0  # (layers, layers) of estimates times their images

    def add(self, layers: list[Tensor]) -> None:
        """Take the same images' features (B, D) of every layer; D may differ between layers."""
        self._waiting = [torch.cat(pair) for pair in zip(self._waiting or [x[:0] for x in layers], layers, strict=True)]
        while len(self._waiting[0]) >= self.minibatch:
            self._sum = self._sum + self.minibatch * unbiased_hsic([x[: self.minibatch] for x in self._waiting])
            self._waiting = [x[self.minibatch :] for x in self._waiting]

    def result(self) -> Tensor | None:
        """(layers, layers) float32; NaN for a layer that says the same of all images. None for too few images."""
        total = self._sum
        rest = len(self._waiting[0]) if self._waiting else 0
        if rest >= FEWEST:
            total = total + rest * unbiased_hsic(self._waiting)
        if not isinstance(total, Tensor):
            return None
        own = total.diagonal()
        own = torch.where(own > 0, own, torch.nan).sqrt()
        return (total / (own[:, None] * own)).float()


def unbiased_hsic(layers: list[Tensor]) -> Tensor:
    """Estimates (layers, layers) of the HSIC of features (n, D) with linear kernels, n of 4 and more.

    With zeros on the diagonals of K and L: (tr(K L) + 1ᵀK1 1ᵀL1 / ((n-1)(n-2)) - 2 1ᵀKL1 / (n-2)) / (n (n-3)) (Song et
    al. 2012, Feature selection via dependence maximization; HSIC_1 of Nguyen et al. 2021).
    """
    n = len(layers[0])
    centerd = [layer.double() - layer.double().mean(0) for layer in layers]  # changes nothing but the rounding
    kernels = torch.stack([layer @ layer.T for layer in centerd])  # (layers, n, n)
    kernels.diagonal(dim1=-2, dim2=-1).zero_()
    sums = kernels.sum(-1)  # (layers, n)
    totals = sums.sum(-1)
    traces = kernels.flatten(1) @ kernels.flatten(1).T
    return (traces + totals.outer(totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums @ sums.T) / (n * (n - 3))


def layers_panel(own: Tensor, random: Tensor | None, dataset: int) -> TitledFigure:
    """CKA between the layers of a model, and with the layers of its random-init model.

    Args:
        own: (blocks, blocks).
        random: (blocks of the model, blocks of the twin).
        dataset: How many the features are of.
    """
    maps = [("model and itself", own, "block", "block")]
    if random is not None:
        maps.append(("model and random init", random, "block", "block of random init"))
    text = (
        f"How alike what the blocks say of {dataset:,} images is: 1 is the same but for rotation and scale, 0 is "
        "unrelated. Bright squares along the diagonal are stages of blocks that change little. Features are mean patch "
        "tokens behind each block; the estimate is unbiased, so that values a little below 0 are possible."
    )
    if random is not None:
        text += " What already random weights have in common with the model comes from the images, not the training."
    return TitledFigure("Similarity of the layers (linear CKA)", _drawn(maps), text)


def versus_panel(between: Tensor, other: str, dataset: int) -> TitledFigure:
    """CKA between the layers of two models (blocks of the one, blocks of the other)."""
    text = (
        f"How alike what the blocks of two models say of {dataset:,} images is: 1 is the same but for rotation "
        f"and scale, 0 is unrelated. Rows are this model, columns {other}. A bright diagonal means that both go "
        "the same way. Features are mean patch tokens behind each block; the estimate is unbiased."
    )
    return TitledFigure(
        "Similarity to another model (linear CKA)", _drawn([("", between, "block", f"block of {other}")]), text
    )


def _drawn(maps: list[tuple[str, Tensor, str, str]]) -> Image.Image:
    return square_maps(maps, "CKA", span=(0, 1), colors="cividis")
