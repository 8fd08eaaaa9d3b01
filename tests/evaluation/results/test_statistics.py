"""Intervals and tests equal published values and slow forms, and cover the true value in simulations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_vit.evaluation.results.statistics import (
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_difference,
    wilson,
)
from tests.reference.statistics import student_t


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # Newcombe 1998, table I: score method
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_equals_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (60, 2.000)])
def test_mean_interval_takes_students_t(freedom, t):
    assert student_t(freedom) == pytest.approx(t, abs=6e-4)
    values = torch.linspace(0.499, 0.501, freedom + 1, dtype=torch.float64)
    low, high = mean_interval(values.tolist())
    half = student_t(freedom) * values.std().item() / (freedom + 1) ** 0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-8)


@pytest.mark.parametrize("count", [2, 5])
def test_mean_interval_covers_the_true_mean_in_95_of_100_repetitions(count):
    drawn = 0.5 + 0.02 * torch.randn(4000, count, generator=torch.Generator().manual_seed(0))
    bounds = [mean_interval(shares) for shares in drawn.double().tolist()]
    assert sum(low <= 0.5 <= high for low, high in bounds) / 4000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_wilson_covers_the_true_share_in_95_of_100_repetitions(share):
    right = torch.distributions.Binomial(100, torch.tensor(share)).sample((4000,))
    bounds = torch.tensor([wilson(int(count), 100) for count in right])
    assert ((bounds[:, 0] <= share) & (share <= bounds[:, 1])).float().mean() > 0.92


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (6, 16, 0.0525),  # the example of the exact test in the literature on McNemar's
        (5, 15, 0.0414),
        (0, 6, 0.03125),  # 2 / 2^6
        (150, 86, 3.716e-05),  # approval of the prime minister, Agresti: R's exact2x2::mcnemar.exact
        (0, 0, 1.0),
        (7, 7, 1.0),
    ],
)
def test_mcnemar_equals_published_values(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p, rel=2e-3)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_mcnemar_equals_counting_all_coin_tosses(gained, lost):
    tosses = gained + lost
    ways = [math.comb(tosses, heads) for heads in range(tosses + 1)]
    as_far = sum(way for way in ways if way <= ways[gained])  # at least as unlikely, on both sides
    assert mcnemar(gained, lost) == pytest.approx(as_far / 2**tosses, rel=1e-9)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_mcnemar_of_many_images():
    exact = 2 * sum(math.comb(3000, count) for count in range(1401)) / 2**3000
    assert mcnemar(1400, 1600) == pytest.approx(exact, rel=1e-9)


def test_paired_bootstrap_of_counts_is_that_of_images():
    """The slow form resamples the images themselves."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 400, generator=generator) < torch.tensor([[0.6], [0.7]])
    rows = torch.randint(400, (4000, 400), generator=generator)
    drawn = second.float()[rows].mean(dim=1) - first.float()[rows].mean(dim=1)
    slow = torch.quantile(drawn, torch.tensor([0.025, 0.975]))
    found = paired_difference(first, second)
    assert found.value == pytest.approx(float(second.float().mean() - first.float().mean()))
    assert (found.low, found.high) == pytest.approx(tuple(slow.tolist()), abs=0.006)
    assert found.gained - found.lost == int(second.sum() - first.sum())
    assert found.p == mcnemar(found.gained, found.lost)


def test_paired_bootstrap_agrees_with_a_published_interval():
    # Agresti, Categorical Data Analysis, approval ratings: 0.04 with 95 % interval (0.02, 0.06)
    low, high = paired_bootstrap(150, 86, 1600, seed=0)
    assert (low, high) == pytest.approx((0.0212, 0.0588), abs=1.5e-3)


def test_paired_bootstrap_depends_on_the_seed_alone():
    of_seeds = [paired_bootstrap(3000, 2900, 50_000, seed=seed) for seed in (1, 1, 2)]
    assert of_seeds[0] == of_seeds[1] != of_seeds[2]


def test_paired_bootstrap_covers_the_true_difference_in_95_of_100_repetitions():
    gained, lost, n = 0.12, 0.08, 500
    counts = np.random.default_rng(0).multinomial(n, [gained, lost, 1 - gained - lost], size=300)
    bounds = [paired_bootstrap(int(up), int(down), n, seed=0) for up, down, _ in counts]
    held = np.mean([low <= gained - lost <= high for low, high in bounds])
    assert 0.925 < held < 0.975


def test_paired_difference_of_equal_predictions_is_zero():
    right = torch.tensor([True, False, True])
    found = paired_difference(right, right)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_holm_equals_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
@settings(max_examples=80, deadline=None)
def test_holm_rejects_what_the_step_down_rule_rejects(ps):
    """The slow form rejects from the smallest p on, until one is above alpha / (number of remaining tests)."""
    alpha, rejected = 0.05, set()
    for done, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if ps[index] * (len(ps) - done) > alpha:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(ps)) if p <= alpha} == rejected
