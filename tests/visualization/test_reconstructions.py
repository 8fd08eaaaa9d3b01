"""Reconstructions: the corruption of the run, distances and their baselines."""

import math
from functools import partial

import pytest
import torch

from ssl_vit.data.transforms.corruption import Corruption
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import sample_keys, view_keys
from ssl_vit.visualization.reconstructions import (
    INPUT,
    MEAN_COLOR,
    compare_with_baselines,
    compute_reconstructions,
    draw_reconstructions,
    mean_distances,
)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (6, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def corrupt_as(config):
    return partial(Corruption(config.corruption), view=0)


def slow_distance(one, other, where):
    """Compute L1 and PSNR pixel by pixel."""
    total = squares = count = 0
    channels, height, width = one.shape
    for y in range(height):
        for x in range(width):
            if where[y, x]:
                for channel in range(channels):
                    difference = float(one[channel, y, x]) - float(other[channel, y, x])
                    total, squares, count = total + abs(difference), squares + difference**2, count + 1
    return total / count, 10 * math.log10(1 / (squares / count))


def test_compare_with_baselines_equals_loops_over_pixels():
    generator = torch.Generator().manual_seed(1)
    clean, corrupted, made = (torch.rand(3, 7, 7, generator=generator) for _ in range(3))
    hidden = torch.rand(7, 7, generator=generator) < 0.3
    found = compare_with_baselines(clean, corrupted, hidden, made)
    color = torch.stack([channel[~hidden].mean() for channel in corrupted])[:, None, None].expand(3, 7, 7)
    for name, answer in ((MODEL, made), (INPUT, corrupted), (MEAN_COLOR, color)):
        assert found.on_hidden[name] == pytest.approx(slow_distance(answer, clean, hidden))
        assert found.on_all[name] == pytest.approx(slow_distance(answer, clean, torch.ones(7, 7)))


def test_compare_with_baselines_without_or_with_only_hidden_pixels():
    x = torch.full((3, 4, 4), 0.25)
    nothing = compare_with_baselines(x, x, torch.zeros(4, 4, dtype=torch.bool), x)
    assert nothing.on_hidden == {}
    assert nothing.on_all[MODEL] == (0, math.inf)
    everything = compare_with_baselines(x, x, torch.ones(4, 4, dtype=torch.bool), x + 0.1)
    assert everything.on_hidden[MODEL] == pytest.approx((0.1, 20), rel=1e-5)
    assert everything.on_hidden == everything.on_all
    assert mean_distances([nothing.on_hidden, everything.on_hidden])[MODEL] == everything.on_hidden[MODEL]
    assert mean_distances([nothing.on_hidden]) == {}
    assert draw_reconstructions([nothing, everything]).width <= 900


def test_compute_reconstructions_uses_the_corruption_of_the_run(pretrain_config, images):
    config = pretrain_config("method=sit", "method.corruption.noise.max_area=0.5").method
    corrupt, inputs = corrupt_as(config), []

    def restore(x):
        inputs.append(x)
        return torch.zeros_like(x)

    first = compute_reconstructions(images, corrupt, restore, config.views, seed=5)
    again = compute_reconstructions(images, corrupt, lambda x: x, config.views, seed=5)
    other = compute_reconstructions(images, corrupt, lambda x: x, config.views, seed=6)
    key = view_keys(sample_keys(5, 0, torch.arange(6)), 0, 2)[:, 0]
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (config.views.mean, config.views.std))
    expected, mask = Corruption(config.corruption)((images / 255 - mean) / std, key, view=0)
    torch.testing.assert_close(inputs[0], expected)
    for one, two, index in zip(first, again, range(6), strict=True):
        assert torch.equal(one.hidden, mask[index, 0])
        assert torch.equal(one.hidden, two.hidden)
        assert torch.equal(one.corrupted, two.corrupted)
        assert torch.equal(two.restored, two.corrupted)  # what was inputs came back
        torch.testing.assert_close(one.restored, mean.expand(3, 48, 48))  # zeros, un-normalized
        assert two.on_hidden.get(MODEL) == two.on_hidden.get(INPUT)
    assert any(not torch.equal(one.hidden, two.hidden) for one, two in zip(again, other, strict=True))


def test_compute_reconstructions_of_a_perfect_model(pretrain_config, images):
    config = pretrain_config("method=sit").method
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (config.views.mean, config.views.std))
    for one in compute_reconstructions(
        images, corrupt_as(config), lambda _: (images / 255 - mean) / std, config.views, seed=0
    ):
        assert one.on_all[MODEL].l1 < 1e-6
        assert one.on_all[MODEL].psnr > 100
        assert one.on_all[INPUT].psnr < 40


def test_compute_reconstructions_rejects_values_that_are_not_finite(pretrain_config, images):
    config = pretrain_config("method=sit").method
    with pytest.raises(UserError, match="not finite"):
        compute_reconstructions(images, corrupt_as(config), lambda x: x * math.nan, config.views, seed=0)
