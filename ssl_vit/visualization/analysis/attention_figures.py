"""Figures of the attention heads (distance, entropy, prefix tokens, diversity) and of attention rollout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL
from ssl_vit.visualization.analysis.activation_collector import ActivationCollector, ExampleMaps
from ssl_vit.visualization.analysis.attention_statistics import rollout_scale_max, uniform_distance
from ssl_vit.visualization.image_grid import TitledFigure, fit_size, image_grid, page, to_pil
from ssl_vit.visualization.overlays import blend_heatmap, resize_map
from ssl_vit.visualization.plots import head_chart

_TILE_SIDE = 330  # pixels of a tile's longer side


def draw_head_statistic(
    kind: str, values: dict[str, Tensor], collector: ActivationCollector, num_images: int
) -> TitledFigure:
    """Draw one statistic of each head, the mean over the images: (blocks, heads) by model.

    The kind is distance, entropy, prefix or diversity; the collector is that of the model, for the sizes.
    """
    patches_only = (
        f"Mean over {num_images:,} images. Attention between patches only: class token and registers are removed, the "
        "rest is scaled to sum 1."
    )
    if kind == "distance":
        uniform, side = uniform_distance(collector.centers), collector.transform.image_size
        low, high = float(values[MODEL].min()), float(values[MODEL].max())
        line = f"uniform attention: {uniform:.1f} pixels", uniform
        image = head_chart(values, "mean attention distance (pixels)", line=line)
        text = (
            f"Mean distance between a patch and the patches that a head attends to, in pixels of {side} x {side} "
            f"images: {low:.1f} to {high:.1f} here. Heads with a low distance attend locally, as convolutions do; "
            f"heads on the dashed line attend uniformly ({uniform:.1f} pixels). {patches_only}"
        )
        return TitledFigure("Mean attention distance", image, text)
    if kind == "entropy":
        image = head_chart(values, "entropy / ln N", line=("uniform attention: 1", 1.0))
        text = "How evenly a head spreads its attention: 0 is all on one patch, 1 (dashed) is uniform over N patches."
        return TitledFigure("Attention entropy", image, f"{text} {patches_only}")
    if kind == "diversity":
        image = head_chart(values, "1 - mean cosine to the other heads")
        text = "How different a head is from the others of its block: 0 is the same attention in all heads."
        return TitledFigure("Head diversity", image, f"{text} {patches_only}")
    backbone = collector.backbone
    tokens = backbone.num_prefix_tokens + len(collector.centers)
    share, registers = 100 * backbone.num_prefix_tokens / tokens, backbone.num_registers
    names = ["the class token"] if backbone.num_prefix_tokens > registers else []
    names += [f"{registers} register{'s' if registers > 1 else ''}"] if registers else []
    percent = {name: 100 * part for name, part in values.items()}
    image = head_chart(percent, "attention received (%)", line=(f"uniform attention: {share:.2g} %", share))
    text = (
        f"Share of the patches' attention on {' and '.join(names)}, of {tokens:,} tokens, mean over {num_images:,} "
        "images. A head far above the dashed line ignores most patches."
    )
    return TitledFigure(f"Attention on {' and '.join(names)}", image, text)


def rollout_figure(examples: Sequence[ExampleMaps], random: Sequence[ExampleMaps]) -> TitledFigure:
    """Draw images beside the attention of the last block and the rollout; each column has one color scale.

    The examples are those of the model, and those of the model with random weights, if any.
    """
    columns = {
        "last block, mean of heads": [example.last for example in examples if example.last is not None],
        "rollout, all blocks": [example.rollout for example in examples if example.rollout is not None],
    }
    if random:
        columns["rollout, random weights"] = [example.rollout for example in random if example.rollout is not None]
    tops = [rollout_scale_max(maps) for maps in columns.values()]
    tops[1:] = [max(tops[1:])] * len(tops[1:])  # the same scale for random weights, whose rollout is flat
    size = fit_size(examples[0].crop, _TILE_SIDE)
    grid = []
    for number, example in enumerate(examples):
        image = to_pil(example.crop, size)
        grid.append([image])
        for maps, top in zip(columns.values(), tops, strict=True):
            heat = resize_map(maps[number], size) * maps[number].numel() / top
            grid[-1].append(blend_heatmap(image, heat.clip(0, 1)))
    titles = ["image", *(f"{name}\n0 to {top:.3g} x uniform" for name, top in zip(columns, tops, strict=True))]
    text = (
        "Where the class token attends: in the last block alone (mean of its heads), and through all blocks with half "
        "of each step passing through the residual branch (attention rollout, Abnar & Zuidema 2020). Rollout becomes "
        "more uniform with depth, and is not specific to a class. Rollouts share one color scale; an evenly colored "
        f"map is uniform attention.{' The column on the right is what random weights give.' if random else ''}"
    )
    return TitledFigure("Attention rollout", page([image_grid(grid, column_titles=titles, title_size=25)]), text)
