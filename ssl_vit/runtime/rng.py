"""Randomness as a function of (seed, epoch, index): the same numbers on any device, worker or process.

A key is one int64 per sample. `fold_in` derives a new key from a key and a number (a view, an operation); `uniform` and
`normal` draw from it. There is no state between calls, so a resumed run has nothing to replay.
The hash is the finalizer of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return the low 64 bits of `value` as a signed int64."""
    return (value & 0xFFFFFFFFFFFFFFFF) - ((value & 0x8000000000000000) << 1)


_GOLDEN, _MIX1, _MIX2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Return the logical right shift; torch's `>>` on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


class RNGStream(IntEnum):
    """Numbers that transforms fold into a view's key, so that no two draw the same values."""

    CROP = 0
    JITTER = 1
    GRAYSCALE = 2
    BLUR = 3
    SOLARIZE = 4
    GRAY_BLOCK = 5
    BLUR_BLOCK = 6
    BLUR_SIGMA = 7
    NOISE_BLOCKS = 8
    REPLACE_BLOCKS = 9
    ROTATION = 10
    DROP_PATH = 11
    NOISE = 12
    RAND_AUGMENT = 13
    ERASING = 14
    MIX = 15


def sample_keys(seed: int, epoch: int, index: Tensor) -> Tensor:
    """Return one key (B,) int64 per image index (B,) int64."""
    run = fold_in(fold_in(torch.zeros_like(index), seed), epoch)
    return _mix(run + index * _GOLDEN)


def fold_in(key: Tensor, number: int) -> Tensor:
    """Return new keys, statistically independent of `key` and of keys with another number folded in."""
    return _mix(_mix(key + _signed((number + 1) * _GOLDEN)) + _GOLDEN)


def view_keys(key: Tensor, first: int, count: int) -> Tensor:
    """Return the keys (*key.shape, count) of views first, first + 1, ...: `fold_in(key, view)` for each."""
    views = torch.arange(first + 1, first + count + 1, device=key.device)
    return _mix(_mix(key.unsqueeze(-1) + views * _GOLDEN) + _GOLDEN)


def uniform(key: Tensor, count: int) -> Tensor:
    """Draw (*key.shape, count) float32 in [0, 1) with 24 random bits each."""
    counter = torch.arange(1, count + 1, device=key.device) * _GOLDEN
    return _shift(_mix(key.unsqueeze(-1) + counter), 40).float() * 2.0**-24


def normal(key: Tensor, count: int, *, where: Tensor | None = None) -> Tensor:
    """Draw (*key.shape, count) float32, standard normal, two from each 64 bits (Box & Muller, 1958); at most 6.7.

    Devices agree up to rounding. `where` (*key.shape, count) bool are the draws that are needed: on the CPU the others
    are 0 and not computed.
    """
    pairs = -(-count // 2)
    if where is not None and key.device.type == "cpu":
        drawn = torch.zeros(key.numel(), count)
        where = where.reshape(drawn.shape)
        for wave, half in ((torch.cos, slice(0, pairs)), (torch.sin, slice(pairs, count))):
            row, column = where[:, half].nonzero(as_tuple=True)
            radius, angle = _polar(key.flatten()[row] + (column + 1) * _GOLDEN)
            drawn[:, half][row, column] = radius * wave(angle)
        return drawn.view(*key.shape, count)
    chunk = 1 << (17 if key.device.type == "cpu" else 24)  # fits a core's cache; occupies a GPU
    counter = torch.arange(1, pairs + 1, device=key.device) * _GOLDEN
    keys = torch.split(key.flatten(), max(1, chunk // pairs))
    polar = [_polar(part.unsqueeze(-1) + counter) for part in keys]
    drawn = torch.cat([torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1) for radius, angle in polar])
    return drawn[:, :count].view(*key.shape, count)


def _polar(state: Tensor) -> tuple[Tensor, Tensor]:
    """Return radius and angle of points with two standard normal coordinates, from counters of any shape."""
    bits = _mix(state)
    radius = (_shift(bits, 32) + 1).float().mul_(2.0**-32).log_().mul_(-2).sqrt_()
    return radius, (bits & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)


def step_seed(*numbers: int) -> int:
    """Return one seed from the numbers that identify a step, such as (seed, step, rank)."""
    key = torch.zeros(1, dtype=torch.int64)
    for number in numbers:
        key = fold_in(key, number)
    return int(key) & 0x7FFFFFFFFFFFFFFF


@contextmanager
def seeded_global_rng() -> Iterator[Callable[[int], None]]:
    """Provide a function that seeds the generators of Python, NumPy and torch (CPU), which are restored afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def seed(key: int) -> None:
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        torch.default_generator.manual_seed(key)  # 100 times as fast as torch.manual_seed

    try:
        yield seed
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
