"""The panels of what the heads do: how far they look, how evenly, at class token and registers, and how alike."""

from __future__ import annotations

from torch import Tensor

from ssl_vit.attention.summary import NETWORK
from ssl_vit.inspection.drawing import head_chart
from ssl_vit.inspection.panel import Panel

_PATCHES = "Attention among the patches alone, class token and registers dropped and the rest scaled to sum 1."


def distance_panel(distance: dict[str, Tensor], uniform: float, side: int, pictures: int) -> Panel:
    """Mean attention distance.

    Args:
        distance: (blocks, heads) in pixels, by network.
        uniform: The distance of uniform attention in pixels.
        side: Of the pictures, in pixels.
        pictures: How many the means are over.
    """
    line = f"uniform attention: {uniform:.1f} pixels", uniform
    image = head_chart(distance, "mean attention distance (pixels)", line=line)
    low, high = float(distance[NETWORK].min()), float(distance[NETWORK].max())
    text = (
        f"How far from a patch the patches lie that a head attends to, in pixels of {side} x {side} pictures, mean of "
        f"{pictures:,}: from {low:.1f} to {high:.1f} here. Low heads look nearby, as convolutions do; heads on the "
        f"dashed line look everywhere alike ({uniform:.1f} pixels); above it they look away. {_PATCHES}"
    )
    return Panel("Mean attention distance", image, text)


def entropy_panel(entropy: dict[str, Tensor], pictures: int) -> Panel:
    """Entropy of the attention (blocks, heads) by network, between 0 and 1."""
    image = head_chart(entropy, "entropy / ln N", line=("uniform attention: 1", 1.0))
    text = (
        "How evenly a head spreads its attention: 0 is all on one patch, 1 (dashed) is the same on each of the N "
        f"patches. Mean over the patches of {pictures:,} pictures. {_PATCHES}"
    )
    return Panel("Attention entropy", image, text)


def prefix_panel(masses: dict[str, Tensor], kinds: dict[str, int], patches: int, pictures: int) -> Panel:
    """Attention on the tokens before the patches.

    Args:
        masses: (blocks, heads, prefix) by network.
        kinds: What these tokens are, in their order, and how many of each.
        patches: How many there are.
        pictures: How many the means are over.
    """
    prefix = sum(kinds.values())
    names = " and ".join(f"{count} {kind}" if kind == "registers" else kind for kind, count in kinds.items() if count)
    share = 100 * prefix / (patches + prefix)
    shown = {name: 100 * mass.sum(-1) for name, mass in masses.items()}
    line = f"uniform attention: {share:.2g} %", share
    image = head_chart(shown, "attention received (%)", line=line)
    text = (
        f"Share of the patches' attention that goes to {names}, of {prefix + patches:,} tokens, mean of {pictures:,} "
        "pictures. Far above the dashed line, a head parks its attention there: it has little to say of these patches."
    )
    title = (
        "Attention on the class token" if prefix == kinds["class token"] else "Attention on class token and registers"
    )
    return Panel(title, image, text)


def diversity_panel(diversity: dict[str, Tensor], pictures: int) -> Panel:
    """Diversity of the heads (blocks, heads) by network, between 0 and 1."""
    image = head_chart(diversity, "1 - mean cosine to the other heads")
    text = (
        "How unlike the other heads of its block a head is: 0 is the same attention in all heads, which could then be "
        f"one. Mean of {pictures:,} pictures. {_PATCHES}"
    )
    return Panel("Head diversity", image, text)
