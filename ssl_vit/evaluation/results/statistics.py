"""Confidence intervals of accuracies and means, and tests of paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, stdtr, stdtrit
from torch import Tensor

RESAMPLES = 10_000
OVER_SUBSETS = "Wilson and Student's t over {} subsets"  # name of the interval of a mean over subsets
Z95 = 1.959964  # standard normal quantile of 0.975


class Difference(NamedTuple):
    """The difference of two models on the same n test images."""

    n: int
    gained: int  # images that only the second model classifies correctly
    lost: int  # images that only the first model classifies correctly
    value: float  # accuracy of the second minus that of the first, in [-1, 1]
    low: float  # of the 95 % interval
    high: float
    p: float  # probability of a difference at least this large if both were equally good, in (0, 1]


def wilson(right: float, n: int) -> tuple[float, float]:
    """Compute Wilson's 95 % score interval (1927) of a fraction: within [0, 1], and valid for small n."""
    share = right / n
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * (share * (1 - share) / n + Z95**2 / (4 * n**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the 95 % interval of the mean of two or more accuracies by Student's t (1908), within [0, 1]."""
    half = _half_width(values)
    return max(0.0, mean(values) - half), min(1.0, mean(values) + half)


def subsets_interval(values: Sequence[float], n: int) -> tuple[float, float]:
    """Compute the 95 % interval of the mean of accuracies over subsets of the training images, within [0, 1].

    All are of the same n test images, so the error of the test sample (Wilson) does not fall with more subsets: it is
    added, in squares, to the one of the mean over subsets.
    """
    middle = mean(values)
    half, (low, high) = _half_width(values), wilson(middle * n, n)
    return max(0.0, middle - hypot(half, middle - low)), min(1.0, middle + hypot(half, high - middle))


def normal_half_width(values: Tensor) -> float:
    """Compute half the 95 % interval of the mean of values (n,) by the normal distribution, for n > 1."""
    return float(Z95 * values.std().item() / len(values) ** 0.5)


def paired_difference(first: Tensor, second: Tensor, *, seed: int = 0) -> Difference:
    """Compare two models by which of the same n > 0 test images they classify correctly, (n,) bool each."""
    n, gained, lost = len(first), int((second & ~first).sum()), int((first & ~second).sum())
    low, high = paired_bootstrap(gained, lost, n, seed=seed)
    return Difference(n, gained, lost, (gained - lost) / n, low, high, mcnemar(gained, lost))


def paired_bootstrap(gained: int, lost: int, n: int, *, seed: int) -> tuple[float, float]:
    """Compute the 95 % percentile interval (Efron 1979) of (gained - lost) / n over 10,000 resamples of n images.

    Drawing n images with replacement is drawing how many of them are gained, lost and neither: one multinomial
    sample per resample, independent of n.
    """
    counts = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], RESAMPLES)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / n, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Compute the exact two-sided p of McNemar's test (1947): twice the binomial tail of the smaller count."""
    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def paired_mean_interval(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """Compute the 95 % interval of the mean of second - first, (n,) each, n > 1, and its p, by the paired t-test."""
    difference = (second - first).double()
    middle, error = difference.mean().item(), difference.std().item() / len(difference) ** 0.5
    half = float(stdtrit(len(difference) - 1, 0.975)) * error
    p = 2 * float(stdtr(len(difference) - 1, -abs(middle) / error)) if error else float(middle == 0)
    return middle - half, middle + half, p


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust the p of several tests by Holm's method (1979), which controls the family-wise error rate."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def _half_width(values: Sequence[float]) -> float:
    return float(stdtrit(len(values) - 1, 0.975) * stdev(values) / len(values) ** 0.5)
