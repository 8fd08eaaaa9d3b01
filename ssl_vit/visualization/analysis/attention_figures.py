"""Figures of the attention heads (distance, entropy, prefix tokens, diversity) and of attention rollout."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL
from ssl_vit.visualization.analysis.attention_statistics import rollout_scale_max
from ssl_vit.visualization.image_grid import TitledFigure, fit_size, image_grid, page, to_pil
from ssl_vit.visualization.overlays import blend_heatmap, resize_map
from ssl_vit.visualization.plots import head_chart

_PATCHES_ONLY = "Attention between patches only: class token and registers are removed, the rest is scaled to sum 1."
_TILE_SIDE = 330  # pixels of a tile's longer side


def distance_figure(distance: dict[str, Tensor], uniform: float, side: int, num_images: int) -> TitledFigure:
    """Draw the mean attention distance of each head.

    Args:
        distance: (blocks, heads) in pixels, by model.
        uniform: The distance of uniform attention in pixels.
        side: Side of the images in pixels.
        num_images: Number of images of the means.
    """
    line = f"uniform attention: {uniform:.1f} pixels", uniform
    image = head_chart(distance, "mean attention distance (pixels)", line=line)
    low, high = float(distance[MODEL].min()), float(distance[MODEL].max())
    text = (
        f"Mean distance between a patch and the patches that a head attends to, in pixels of {side} x {side} images, "
        f"over {num_images:,} images: {low:.1f} to {high:.1f} here. Heads with a low distance attend locally, as "
        f"convolutions do; heads on the dashed line attend uniformly ({uniform:.1f} pixels). {_PATCHES_ONLY}"
    )
    return TitledFigure("Mean attention distance", image, text)


def entropy_figure(entropy: dict[str, Tensor], num_images: int) -> TitledFigure:
    """Draw the entropy of each head's attention, (blocks, heads) by model, between 0 and 1."""
    image = head_chart(entropy, "entropy / ln N", line=("uniform attention: 1", 1.0))
    text = (
        "How evenly a head spreads its attention: 0 is all on one patch, 1 (dashed) is uniform over the N patches. "
        f"Mean over the patches of {num_images:,} images. {_PATCHES_ONLY}"
    )
    return TitledFigure("Attention entropy", image, text)


def prefix_figure(
    attention: dict[str, Tensor], token_counts: dict[str, int], num_patches: int, num_images: int
) -> TitledFigure:
    """Draw the attention on the tokens before the patches.

    Args:
        attention: (blocks, heads, prefix) by model.
        token_counts: Number of these tokens by kind, in order.
        num_patches: Number of patches.
        num_images: Number of images of the means.
    """
    prefix = sum(token_counts.values())
    names = " and ".join(
        f"the {kind}" if kind == "class token" else f"{count} {kind}{'s' if count > 1 else ''}"
        for kind, count in token_counts.items()
        if count
    )
    share = 100 * prefix / (num_patches + prefix)
    percent = {name: 100 * values.sum(-1) for name, values in attention.items()}
    image = head_chart(percent, "attention received (%)", line=(f"uniform attention: {share:.2g} %", share))
    text = (
        f"Share of the patches' attention on {names}, of {prefix + num_patches:,} tokens, mean over {num_images:,} "
        "images. A head far above the dashed line ignores most patches."
    )
    return TitledFigure(f"Attention on {names}", image, text)


def diversity_figure(diversity: dict[str, Tensor], num_images: int) -> TitledFigure:
    """Draw the diversity of the heads, (blocks, heads) by model, between 0 and 1."""
    image = head_chart(diversity, "1 - mean cosine to the other heads")
    text = (
        "How different a head is from the other heads of its block: 0 is the same attention in all heads. Mean over "
        f"{num_images:,} images. {_PATCHES_ONLY}"
    )
    return TitledFigure("Head diversity", image, text)


class RolloutRow(NamedTuple):
    """One image with attention maps of its class token; each map (rows, columns) sums to 1."""

    image: Tensor  # (C, H, W) uint8
    last: Tensor  # attention of the last block, mean over the heads
    rollout: Tensor
    random: Tensor | None  # rollout of the same model with random weights


def rollout_figure(rows: list[RolloutRow]) -> TitledFigure:
    """Draw images beside the attention of the last block and the rollout; each column has one color scale."""
    columns = {
        "last block, mean of heads": [row.last for row in rows],
        "rollout, all blocks": [row.rollout for row in rows],
    }
    random = [row.random for row in rows if row.random is not None]
    if random:
        columns["rollout, random weights"] = random
    tops = [rollout_scale_max(maps) for maps in columns.values()]
    tops[1:] = [max(tops[1:])] * len(tops[1:])  # the same scale for random weights, whose rollout is flat
    size = fit_size(rows[0].image, _TILE_SIDE)
    grid = []
    for number, row in enumerate(rows):
        image = to_pil(row.image, size)
        heats = (
            resize_map(maps[number], size) * maps[number].numel() / top
            for maps, top in zip(columns.values(), tops, strict=True)
        )
        grid.append([image, *(blend_heatmap(image, heat.clip(0, 1)) for heat in heats)])
    titles = ["image", *(f"{name}\n0 to {top:.3g} x uniform" for name, top in zip(columns, tops, strict=True))]
    text = (
        "Where the class token attends: in the last block alone (mean of its heads), and through all blocks with half "
        "of each step passing through the residual branch (attention rollout, Abnar & Zuidema 2020). Rollout becomes "
        "more uniform with depth, and is not specific to a class. Rollouts share one color scale; an evenly colored "
        "map is uniform attention."
    )
    if random:
        text += " The column on the right is what random weights give."
    return TitledFigure("Attention rollout", page([image_grid(grid, column_titles=titles, title_size=25)]), text)
