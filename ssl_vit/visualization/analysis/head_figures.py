"""The panels of what the heads do: how far they look, how evenly, at class token and registers, and how alike."""

from __future__ import annotations

from torch import Tensor

from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL
from ssl_vit.visualization.image_grid import TitledFigure
from ssl_vit.visualization.plots import head_chart

_PATCHES = "Attention among the patches alone, class token and registers dropped and the rest scaled to sum 1."


def distance_panel(distance: dict[str, Tensor], uniform: float, side: int, dataset: int) -> TitledFigure:
    """Mean attention distance.

    Args:
        distance: (blocks, heads) in pixels, by model.
        uniform: The distance of uniform attention in pixels.
        side: Of the images, in pixels.
        dataset: How many the means are over.
    """
    line = f"uniform attention: {uniform:.1f} pixels", uniform
    image = head_chart(distance, "mean attention distance (pixels)", line=line)
    low, high = float(distance[MODEL].min()), float(distance[MODEL].max())
    text = (
        f"How far from a patch the patches lie that a head attends to, in pixels of {side} x {side} images, mean of "
        f"{dataset:,}: from {low:.1f} to {high:.1f} here. Low heads look nearby, as convolutions do; heads on the "
        f"dashed line look everywhere alike ({uniform:.1f} pixels); above it they look away. {_PATCHES}"
    )
    return TitledFigure("Mean attention distance", image, text)


def entropy_panel(entropy: dict[str, Tensor], dataset: int) -> TitledFigure:
    """Entropy of the attention (blocks, heads) by model, between 0 and 1."""
    image = head_chart(entropy, "entropy / ln N", line=("uniform attention: 1", 1.0))
    text = (
        "How evenly a head spreads its attention: 0 is all on one patch, 1 (dashed) is the same on each of the N "
        f"patches. Mean over the patches of {dataset:,} images. {_PATCHES}"
    )
    return TitledFigure("Attention entropy", image, text)


def prefix_panel(masses: dict[str, Tensor], kinds: dict[str, int], patches: int, dataset: int) -> TitledFigure:
    """Attention on the tokens before the patches.

    Args:
        masses: (blocks, heads, prefix) by model.
        kinds: What these tokens are, in their order, and how many of each.
        patches: How many there are.
        dataset: How many the means are over.
    """
    prefix = sum(kinds.values())
    names = " and ".join(_counted(kind, count) for kind, count in kinds.items() if count)
    share = 100 * prefix / (patches + prefix)
    shown = {name: 100 * mass.sum(-1) for name, mass in masses.items()}
    line = f"uniform attention: {share:.2g} %", share
    image = head_chart(shown, "attention received (%)", line=line)
    text = (
        f"Share of the patches' attention that goes to {names}, of {prefix + patches:,} tokens, mean of {dataset:,} "
        "images. Far above the dashed line, a head parks its attention there: it has little to say of these patches."
    )
    return TitledFigure(f"Attention on {names}", image, text)


def diversity_panel(diversity: dict[str, Tensor], dataset: int) -> TitledFigure:
    """Diversity of the heads (blocks, heads) by model, between 0 and 1."""
    image = head_chart(diversity, "1 - mean cosine to the other heads")
    text = (
        "How unlike the other heads of its block a head is: 0 is the same attention in all heads, which could then be "
        f"one. Mean of {dataset:,} images. {_PATCHES}"
    )
    return TitledFigure("Head diversity", image, text)


def _counted(kind: str, count: int) -> str:
    return f"the {kind}" if kind == "class token" else f"{count} {kind}{'s' if count > 1 else ''}"
