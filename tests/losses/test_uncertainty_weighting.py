"""Learned uncertainty weights and fixed weights of losses."""

import math

import pytest
import torch

from ssl_vit.losses.uncertainty_weighting import FixedWeights, UncertaintyWeights


def test_uncertainty_weights_equal_sit_version_1_1():
    """e^-s L + s/2 for cross-entropies, e^(-s/2) L + s/2 for the L1; s starts at 1."""
    losses = {"rotation": 1.2, "contrastive": 4.0, "reconstruction": 0.7}
    weights = UncertaintyWeights(list(losses))
    total = weights({name: torch.tensor(value) for name, value in losses.items()})
    textbook = math.exp(-1) * 1.2 + 0.5 + math.exp(-1) * 4.0 + 0.5 + math.exp(-0.5) * 0.7 + 0.5
    assert total.item() == pytest.approx(textbook)


def test_uncertainty_weights_have_no_gradient_at_the_optimum():
    """s* = ln 2L for the cross-entropies, 2 ln L for the L1."""
    losses = {"rotation": 1.2, "contrastive": 4.0, "reconstruction": 0.7}
    weights = UncertaintyWeights(list(losses))
    optimum = {"rotation": math.log(2.4), "contrastive": math.log(8.0), "reconstruction": 2 * math.log(0.7)}
    with torch.no_grad():
        for name, value in optimum.items():
            weights.s[name].fill_(value)
    weights({name: torch.tensor(value) for name, value in losses.items()}).backward()
    for parameter in weights.parameters():
        assert parameter.grad.item() == pytest.approx(0, abs=1e-6)


def test_uncertainty_weights_are_bounded():
    weights = UncertaintyWeights(["rotation"])
    with torch.no_grad():
        weights.s["rotation"].fill_(-50)
    assert weights.weight("rotation").item() == pytest.approx(math.exp(4))


def test_fixed_weights_sum_the_losses():
    weights = FixedWeights({"rotation": 0.5, "reconstruction": 2.0})
    assert weights({"rotation": torch.tensor(3.0), "reconstruction": torch.tensor(1.0)}).item() == pytest.approx(3.5)
    assert not list(weights.parameters())
