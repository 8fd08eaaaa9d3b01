"""Reconstructions of corrupted images: their error, compared with baselines, and their figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ssl_vit.config.methods import ViewsConfig
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL
from ssl_vit.models.attention_maps import upsample_mask
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import sample_keys, view_keys
from ssl_vit.visualization.image_grid import (
    apply_color_map,
    color_bar,
    draw_outline,
    image_grid,
    legend,
    page,
    stack,
    text_image,
    to_pil,
)

MEAN_COLOR, INPUT = "mean color", "input unchanged"
TILE = 132  # pixels of a tile's side
MAX_ERROR = 0.5  # mean absolute error of the channels at the end of the color scale
OUTLINE = (70, 225, 255)  # of the hidden pixels

Corrupt = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images (B, C, S, S), keys (B,) -> images, mask
Restore = Callable[[Tensor], Tensor]  # normalized corrupted images (B, C, S, S) -> normalized restored images


class Distance(NamedTuple):
    """Distance of two images with values in [0, 1], over some pixels and all channels."""

    l1: float  # mean absolute difference
    psnr: float  # in dB: -10 log10 of the mean squared difference; infinite for equal images


class Reconstruction(NamedTuple):
    """One image with its reconstruction; all values in [0, 1]."""

    clean: Tensor  # (C, S, S)
    corrupted: Tensor  # (C, S, S)
    hidden: Tensor  # (S, S) bool: pixels replaced by noise or another image
    restored: Tensor  # (C, S, S)
    on_hidden: dict[str, Distance]  # to `clean`, of the model and of the baselines; empty if no pixel is hidden
    on_all: dict[str, Distance]  # likewise, over all pixels


def compute_reconstructions(
    images: Tensor, corrupt: Corrupt, restore: Restore, views: ViewsConfig, *, seed: int
) -> list[Reconstruction]:
    """Corrupt images (B, C, S, S) uint8 as in training, without rotation, restore them, and compare.

    The corruption depends only on the images and the seed; blocks are exchanged within groups of four images. Of the
    run's views the normalization is used.

    Raises:
        UserError: The reconstructions are not finite.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (views.mean, views.std))
    clean = images.float() / 255
    keys = view_keys(sample_keys(seed, 0, torch.arange(len(images))), 0, 1).squeeze(1)
    corrupted, mask = corrupt((clean - mean) / std, keys)
    restored = restore(corrupted).float().cpu()
    if not restored.isfinite().all():
        raise UserError("the reconstructions are not finite: the model has diverged")
    corrupted, restored = ((values * std + mean).clamp(0, 1) for values in (corrupted, restored))
    parts = zip(clean, corrupted, mask[:, 0], restored, strict=True)
    return [compare_with_baselines(*part) for part in parts]


def compare_with_baselines(clean: Tensor, corrupted: Tensor, hidden: Tensor, restored: Tensor) -> Reconstruction:
    """Compute the distances of a reconstruction, of the unchanged input and of the mean color of the visible pixels.

    The images are (C, S, S) in [0, 1], the hidden pixels (S, S) bool.
    """
    visible = corrupted[:, ~hidden] if not hidden.all() else corrupted.flatten(1)  # (C, pixels)
    mean_color = visible.mean(dim=1)[:, None, None].expand_as(clean)
    answers = {MODEL: restored, MEAN_COLOR: mean_color, INPUT: corrupted}
    on_hidden, on_all = (
        {name: distance(answer, clean, where) for name, answer in answers.items()} if where.any() else {}
        for where in (hidden, torch.ones_like(hidden))
    )
    return Reconstruction(clean, corrupted, hidden, restored, on_hidden, on_all)


def distance(one: Tensor, other: Tensor, where: Tensor) -> Distance:
    """Compute the distance of images (C, S, S) in [0, 1] on the pixels `where` (S, S) bool, at least one."""
    difference = (one - other)[:, where].double()
    squared = difference.square().mean().item()
    return Distance(difference.abs().mean().item(), -10 * math.log10(squared) if squared else math.inf)


def mean_distances(distances: Sequence[Mapping[str, Distance]]) -> dict[str, Distance]:
    """Compute the means over images, by name; images without distances are excluded."""
    present = [each for each in distances if each]
    return {
        name: Distance(*(sum(values) / len(present) for values in zip(*(each[name] for each in present), strict=True)))
        for name in (present[0] if present else {})
    }


def draw_reconstructions(reconstructions: Sequence[Reconstruction]) -> Image.Image:
    """Draw one row per image (at least one): image, input, reconstruction, error, distances; their means below."""
    rows = []
    for one in reconstructions:
        tiles = [to_pil(part, (TILE, TILE)) for part in (one.clean, one.corrupted, one.restored)]
        hidden = f"hidden pixels, {one.hidden.float().mean().item():.0%}"
        rows.append([*tiles, _draw_error(one), _distance_table({hidden: one.on_hidden, "all pixels": one.on_all})])
    count = sum(bool(one.on_hidden) for one in reconstructions)
    mean = {
        f"mean of {count}: hidden pixels": mean_distances([one.on_hidden for one in reconstructions]),
        "all pixels": mean_distances([one.on_all for one in reconstructions]),
    }
    lines = [
        "Gray or blurred blocks do not count as hidden. Images are upright; values are in",
        "[0, 1]. The mean color is that of the pixels that are not hidden: a model that is",
        "not better than it restores nothing.",
    ]
    explanation = [
        color_bar({0: "0", 1: f"mean absolute error of the channels: {MAX_ERROR} or more"}),
        legend({"hidden pixels: replaced by noise or another image": OUTLINE}),
        text_image(lines),
    ]
    grid = image_grid(rows, column_titles=["image", "corrupted: input", "reconstruction", "error"], title_size=14)
    return page([grid, stack([stack(explanation), _distance_table(mean)], horizontal=True)])


def _draw_error(one: Reconstruction) -> Image.Image:
    error = (one.restored - one.clean).abs().mean(dim=0)  # (S, S)
    tile = apply_color_map((error / MAX_ERROR).clamp(0, 1)).resize((TILE, TILE), Image.Resampling.NEAREST)
    draw_outline(tile, upsample_mask(one.hidden, (TILE, TILE)), OUTLINE)
    return tile


def _distance_table(parts: Mapping[str, Mapping[str, Distance]]) -> Image.Image:
    columns: list[list[str]] = [[], [], []]
    for title, distances in parts.items():
        rows = [(title, "L1", "PSNR")]
        rows += [(f"   {name}", f"{found.l1:.3f}", f"{found.psnr:.1f} dB") for name, found in distances.items()]
        for column, texts in zip(columns, zip(*rows, strict=True), strict=True):
            column += texts
    return stack([text_image(lines, size=12) for lines in columns], horizontal=True, gap=12)
