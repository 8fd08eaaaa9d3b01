"""NT-Xent against the double loop over embeddings."""

import math

import pytest
import torch

from ssl_vit.losses.nt_xent import nt_xent
from tests.reference import losses as slow


@pytest.mark.parametrize(("batch", "dim"), [(1, 4), (2, 3), (5, 8), (16, 32)])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_the_double_loop(batch, dim, temperature):
    generator = torch.Generator().manual_seed(batch)
    first, second = torch.randn(2, batch, dim, generator=generator).unbind()
    loss, _ = nt_xent(first, second, temperature=temperature)
    textbook = slow.nt_xent(first.double().numpy(), second.double().numpy(), temperature)
    assert loss.item() == pytest.approx(textbook, rel=1e-5, abs=1e-7)
    swapped, _ = nt_xent(second, first, temperature=temperature)
    assert swapped.item() == pytest.approx(loss.item())


def test_nt_xent_of_equal_embeddings_is_ln_of_the_number_of_others():
    loss, _ = nt_xent(torch.ones(72, 8), torch.ones(72, 8), temperature=0.5)
    assert loss.item() == pytest.approx(math.log(2 * 72 - 1), rel=1e-5)


def test_nt_xent_accuracy_is_the_fraction_of_positives_found():
    apart = torch.eye(6)
    _, perfect = nt_xent(apart, apart, temperature=0.5)
    _, wrong = nt_xent(apart, apart.roll(1, 0), temperature=0.5)
    assert perfect.item() == 1
    assert wrong.item() == 0
