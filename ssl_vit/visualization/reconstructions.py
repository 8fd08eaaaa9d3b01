"""SiT's reconstructions beside what was hidden: images, corrupted, restored, and by how much that is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.config.methods import SiTConfig
from ssl_vit.data.transforms.corruption import Corruption
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import sample_keys, view_keys

MEAN_COLOR, INPUT = "mean color", "input as it is"

Restore = Callable[[Tensor], Tensor]  # normalized corrupted images (B, C, S, S) -> normalized restored ones


class Distance(NamedTuple):
    """Between two images with values in [0, 1], over some pixels and all channels."""

    l1: float  # mean absolute difference
    psnr: float  # in dB: -10 log10 of the mean squared difference; infinite for equal images


class Reconstruction(NamedTuple):
    """One image with what was made of it; all in [0, 1]."""

    clean: Tensor  # (C, S, S)
    corrupted: Tensor  # (C, S, S)
    hidden: Tensor  # (S, S) bool: the corrupted pixels, where noise or another image stands
    restored: Tensor  # (C, S, S)
    on_hidden: dict[str, Distance]  # to `clean`, of the model and of what it has to beat; empty where none is hidden
    on_all: dict[str, Distance]  # the same over all pixels


def compute_reconstructions(dataset: Tensor, restore: Restore, config: SiTConfig, *, seed: int) -> list[Reconstruction]:
    """Corrupt images as the run does, upright, let them be restored, and compare.

    The same images and seed are corrupted in the same way, whatever restores them.

    Args:
        dataset: (B, C, S, S) uint8. They lend each other blocks, within fours.
        restore: The model, in evaluation mode.
        config: Of the run: its corruption and its normalization.
        seed: Of the corruption.

    Raises:
        UserError: What the model makes is not finite.
    """
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (config.views.mean, config.views.std))
    clean = dataset.float() / 255
    key = view_keys(sample_keys(seed, 0, torch.arange(len(dataset))), 0, 1).squeeze(1)
    corrupted, mask = Corruption(config.corruption)((clean - mean) / std, key, view=0)
    restored = restore(corrupted).float().cpu()
    if not restored.isfinite().all():
        raise UserError("the reconstructions are not finite: the model has diverged")
    return [
        compared(*parts)
        for parts in zip(
            clean, (corrupted * std + mean).clamp(0, 1), mask[:, 0], (restored * std + mean).clamp(0, 1), strict=True
        )
    ]


def compared(clean: Tensor, corrupted: Tensor, hidden: Tensor, restored: Tensor) -> Reconstruction:
    """A reconstruction beside two that need no model: the input itself, and the mean color of what is visible.

    Args:
        clean: (C, S, S) in [0, 1], as all images here.
        corrupted: (C, S, S).
        hidden: (S, S) bool.
        restored: (C, S, S).
    """
    visible = corrupted[:, ~hidden] if not hidden.all() else corrupted.flatten(1)  # (C, pixels)
    answers = {
        MODEL: restored,
        MEAN_COLOR: visible.mean(dim=1)[:, None, None].expand_as(clean),
        INPUT: corrupted,
    }
    everywhere = torch.ones_like(hidden)
    on_hidden, on_all = (
        {name: distance(answer, clean, where) for name, answer in answers.items()} if where.any() else {}
        for where in (hidden, everywhere)
    )
    return Reconstruction(clean, corrupted, hidden, restored, on_hidden, on_all)


def distance(one: Tensor, other: Tensor, where: Tensor) -> Distance:
    """Between images (C, S, S) in [0, 1] on the pixels `where` (S, S) bool, of which there is one at least."""
    difference = (one - other)[:, where].double()
    squared = difference.square().mean().item()
    return Distance(difference.abs().mean().item(), -10 * math.log10(squared) if squared else math.inf)


def means(distances: list[dict[str, Distance]]) -> dict[str, Distance]:
    """Over images, by name; those of which there is no distance do not count."""
    there = [each for each in distances if each]
    return {
        name: Distance(*(sum(values) / len(there) for values in zip(*(each[name] for each in there), strict=True)))
        for name in (there[0] if there else {})
    }
