"""SiT's reconstructions beside what was hidden: pictures, corrupted, restored, and by how much that is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.attention.summary import NETWORK
from ssl_vit.config import SiTConfig
from ssl_vit.errors import UserError
from ssl_vit.transforms.corruption import Corruption
from ssl_vit.transforms.randomness import sample_keys, view_keys

MEAN_COLOUR, INPUT = "mean colour", "input as it is"

Restore = Callable[[Tensor], Tensor]  # normalised corrupted pictures (B, C, S, S) -> normalised restored ones


class Distance(NamedTuple):
    """Between two pictures with values in [0, 1], over some pixels and all channels."""

    l1: float  # mean absolute difference
    psnr: float  # in dB: -10 log10 of the mean squared difference; infinite for equal pictures


class Reconstruction(NamedTuple):
    """One picture with what was made of it; all in [0, 1]."""

    clean: Tensor  # (C, S, S)
    corrupted: Tensor  # (C, S, S)
    hidden: Tensor  # (S, S) bool: the corrupted pixels, where noise or another picture stands
    restored: Tensor  # (C, S, S)
    on_hidden: dict[str, Distance]  # to `clean`, of the network and of what it has to beat; empty where none is hidden
    on_all: dict[str, Distance]  # the same over all pixels


def reconstruct(pictures: Tensor, restore: Restore, config: SiTConfig, *, seed: int) -> list[Reconstruction]:
    """Corrupt pictures as the run does, upright, let them be restored, and compare.

    The same pictures and seed are corrupted in the same way, whatever restores them.

    Args:
        pictures: (B, C, S, S) uint8. They lend each other blocks, within fours.
        restore: The network, in evaluation mode.
        config: Of the run: its corruption and its normalisation.
        seed: Of the corruption.

    Raises:
        UserError: What the network makes is not finite.
    """
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (config.views.mean, config.views.std))
    clean = pictures.float() / 255
    key = view_keys(sample_keys(seed, 0, torch.arange(len(pictures))), 0, 1).squeeze(1)
    corrupted, mask = Corruption(config.corruption)((clean - mean) / std, key, view=0)
    restored = restore(corrupted).float().cpu()
    if not restored.isfinite().all():
        raise UserError("the reconstructions are not finite: the network has diverged")
    return [
        compared(*parts)
        for parts in zip(
            clean, (corrupted * std + mean).clamp(0, 1), mask[:, 0], (restored * std + mean).clamp(0, 1), strict=True
        )
    ]


def compared(clean: Tensor, corrupted: Tensor, hidden: Tensor, restored: Tensor) -> Reconstruction:
    """A reconstruction beside two that need no network: the input itself, and the mean colour of what is visible.

    Args:
        clean: (C, S, S) in [0, 1], as all pictures here.
        corrupted: (C, S, S).
        hidden: (S, S) bool.
        restored: (C, S, S).
    """
    visible = corrupted[:, ~hidden] if not hidden.all() else corrupted.flatten(1)  # (C, pixels)
    answers = {
        NETWORK: restored,
        MEAN_COLOUR: visible.mean(dim=1)[:, None, None].expand_as(clean),
        INPUT: corrupted,
    }
    everywhere = torch.ones_like(hidden)
    on_hidden, on_all = (
        {name: distance(answer, clean, where) for name, answer in answers.items()} if where.any() else {}
        for where in (hidden, everywhere)
    )
    return Reconstruction(clean, corrupted, hidden, restored, on_hidden, on_all)


def distance(one: Tensor, other: Tensor, where: Tensor) -> Distance:
    """Between pictures (C, S, S) in [0, 1] on the pixels `where` (S, S) bool, of which there is one at least."""
    difference = (one - other)[:, where].double()
    squared = difference.square().mean().item()
    return Distance(difference.abs().mean().item(), -10 * math.log10(squared) if squared else math.inf)


def means(distances: list[dict[str, Distance]]) -> dict[str, Distance]:
    """Over pictures, by name; those of which there is no distance do not count."""
    there = [each for each in distances if each]
    return {
        name: Distance(*(sum(values) / len(there) for values in zip(*(each[name] for each in there), strict=True)))
        for name in (there[0] if there else {})
    }
