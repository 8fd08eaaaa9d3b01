"""Keyed random numbers: SplitMix64's published values, distribution, independence, and invariance to batching."""

import numpy as np
import pytest
import torch

from ssl_vit.runtime.rng import fold_in, normal, sample_keys, step_seed, uniform, view_keys


@pytest.fixture(scope="module")
def keys():
    return sample_keys(0, 0, torch.arange(20_000))


def test_uniform_equals_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # of seed 1234567
    drawn = uniform(torch.tensor(1234567), 4)
    assert drawn.tolist() == [(value >> 40) / 2**24 for value in published]


def test_sample_keys_never_change():
    """A change would silently change every resumed run."""
    key = sample_keys(3, 5, torch.tensor([0, 7]))
    assert key.tolist() == [-8598843968799353419, 3959287159576922244]
    assert fold_in(key, 2).tolist() == [-6147746541521467729, 5114574886835120481]
    assert step_seed(3, 5) == 1259899096635836125


def test_uniform_is_uniform(keys):
    drawn = uniform(keys, 8)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (20_000, 8)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.T.double().numpy():
        counts, _ = np.histogram(column, bins=64, range=(0, 1))
        expected = len(column) / 64
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert 63 - 5 * 126**0.5 < chi_square < 63 + 5 * 126**0.5  # mean 63, variance 126


def test_uniform_of_different_keys_is_independent(keys):
    """Seeds, epochs, folded numbers, views, counters and adjacent indices: no two rows correlate."""
    rows = [uniform(keys, 2).T]
    rows += [uniform(fold_in(keys, number), 1).T for number in (0, 1, 2, 1000)]
    rows += [uniform(view_keys(fold_in(keys, 77), 0, 3), 1).squeeze(-1).T]
    rows += [uniform(sample_keys(seed, epoch, torch.arange(20_000)), 1).T for seed, epoch in [(0, 1), (1, 0), (1, 1)]]
    rows += [uniform(keys.roll(1), 1).T]
    correlation = np.corrcoef(torch.cat(rows).double().numpy())
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / 20_000**0.5


def test_fold_in_depends_on_the_order(keys):
    assert not torch.equal(fold_in(fold_in(keys, 1), 2), fold_in(fold_in(keys, 2), 1))
    assert len(set(keys.tolist()) | set(fold_in(keys, 0).tolist()) | set(fold_in(keys, 1).tolist())) == 60_000


def test_view_keys_equal_fold_in(keys):
    views = view_keys(keys, 2, 3)
    assert torch.equal(views, torch.stack([fold_in(keys, view) for view in (2, 3, 4)], dim=-1))


def test_uniform_does_not_depend_on_the_batch(keys):
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(keys[order], 5), uniform(keys, 5)[order])
    assert torch.equal(uniform(keys, 5)[:, :3], uniform(keys, 3))
    assert torch.equal(sample_keys(0, 0, order), keys[order])
    assert torch.equal(uniform(keys.reshape(100, 200), 5).reshape(-1, 5), uniform(keys, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_uniform_and_normal_are_equal_on_a_gpu(keys):
    assert torch.equal(uniform(fold_in(keys.cuda(), 4), 5).cpu(), uniform(fold_in(keys, 4), 5))
    torch.testing.assert_close(normal(keys.cuda(), 7).cpu(), normal(keys, 7), rtol=1e-5, atol=1e-5)


def test_uniform_does_not_use_the_global_generator(keys):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = uniform(keys, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(uniform(keys, 3), first)


def test_normal_is_normal():
    """Moments, distribution (Kolmogorov-Smirnov at p = .001) and range of 2 million draws."""
    drawn = normal(sample_keys(0, 0, torch.arange(2_000)), 1_001)
    assert drawn.shape == (2_000, 1_001)
    assert drawn.dtype == torch.float32
    x = drawn.double().flatten()
    n = len(x)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((x**power).mean().item() - moment) < 4 * (variance / n) ** 0.5
    cdf = torch.special.ndtr(x.sort().values)
    distance = max((cdf - torch.arange(n) / n).max(), (torch.arange(1, n + 1) / n - cdf).max())
    assert distance < 1.95 / n**0.5
    assert 4.6 < x.abs().max() < 6.7


def test_normal_of_one_key_is_independent(keys):
    """Neither the values nor their squares correlate, also of the two values from one hash, which share a radius."""
    rows = normal(keys, 8).T
    for values in (rows, rows**2):
        correlation = np.corrcoef(values.double().numpy())
        np.fill_diagonal(correlation, 0)
        assert np.abs(correlation).max() < 5 / 20_000**0.5


def test_normal_does_not_depend_on_the_batch(keys):
    few = keys[:300]
    expected = normal(few, 999)
    assert torch.equal(torch.cat([normal(part, 999) for part in few.split(7)]), expected)
    assert torch.equal(normal(few.reshape(3, 100), 999).reshape(300, 999), expected)
    assert not torch.equal(normal(fold_in(few, 1), 999), expected)


def test_step_seed_is_unique_and_fits_a_generator():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize("count", [1, 7, 3072])
def test_normal_with_where_equals_normal(count):
    keys = sample_keys(0, 0, torch.arange(6)).view(2, 3)
    expected = normal(keys, count)
    where = uniform(keys, count) < 0.3
    assert torch.equal(normal(keys, count, where=where), expected.where(where, 0))
