"""How sure a share of test images is, and a difference of two models that answered the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 10_000
OVER_SUBSETS = "Student's t over {} subsets"  # what records call the interval of a mean


class Difference(NamedTuple):
    """How two models differ on the same n test images."""

    n: int
    gained: int  # images that only the second has right
    lost: int  # images that only the first has right
    value: float  # share of right answers of the second minus that of the first, in [-1, 1]
    low: float  # of the 95 % interval
    high: float
    p: float  # of a difference at least so large if both were equally good, in (0, 1]


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score (1927): it stays in [0, 1] and holds for few images too.

    Example:
        >>> low, high = wilson(8, 10)
        >>> f"{low:.3f} {high:.3f}"
        '0.490 0.943'
    """
    z = 1.959964
    share = right / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(shares: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two shares or more that were drawn alike, by Student's t (1908), in [0, 1].

    Example:
        >>> low, high = mean_interval([0.4, 0.5, 0.6])
        >>> f"{low:.3f} {high:.3f}"
        '0.252 0.748'
    """
    half = student_t(len(shares) - 1) * stdev(shares) / len(shares) ** 0.5
    return max(0.0, mean(shares) - half), min(1.0, mean(shares) + half)


def student_t(freedom: int) -> float:
    """How far 95 % of Student's t reaches to either side, for whole degrees of freedom above 0.

    Halving intervals of the angle whose tangent is t / sqrt(freedom), by its finite series (Abramowitz and Stegun,
    26.7.3 and 26.7.4).

    Example:
        >>> f"{student_t(4):.4f}"
        '2.7764'
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        odd = freedom % 2
        term = math.sin(angle) * (math.cos(angle) if odd else 1)
        inside = 0.0
        for power in range(odd, freedom - 1, 2):
            inside += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
        if odd:
            inside = (angle + inside) * 2 / math.pi
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return float(math.tan(low) * math.sqrt(freedom))


def difference(first: Tensor, second: Tensor, *, seed: int = 0) -> Difference:
    """The paired difference of two models by which test images they have right, (n,) bool each, with n > 0."""
    n, gained, lost = len(first), int((second & ~first).sum()), int((first & ~second).sum())
    low, high = paired_bootstrap(gained, lost, n, seed=seed)
    return Difference(n, gained, lost, (gained - lost) / n, low, high, mcnemar(gained, lost))


def paired_bootstrap(gained: int, lost: int, n: int, *, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval (Efron 1979) of (gained - lost) / n over 10,000 resamples of the n images.

    To draw n images again with replacement is to draw how many of them are gained, lost and neither: one
    multinomial number per resample, whatever n is.

    Args:
        gained: Images that only the second model has right.
        lost: Images that only the first one has right.
        n: All images.
        seed: Of the resamples.
    """
    drawn = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p of McNemar's test (1947): the smaller count and all below it, of a fair coin, twice.

    Example:
        >>> f"{mcnemar(6, 16):.4f}"
        '0.0525'
    """
    tosses, few = gained + lost, torch.arange(min(gained, lost) + 1, dtype=torch.float64)
    log_ways = math.lgamma(tosses + 1) - torch.lgamma(few + 1) - torch.lgamma(tosses - few + 1)
    return min(1.0, 2 * float((log_ways - tosses * math.log(2)).exp().sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """The p of several tests corrected for their number (Holm 1979): the chance of any false finding stays as said.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=ps.__getitem__)
    corrected, largest = [0.0] * len(ps), 0.0
    for before, place in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - before) * ps[place]))
        corrected[place] = largest
    return corrected
