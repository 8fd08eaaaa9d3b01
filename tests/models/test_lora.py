"""Low-rank updates: nothing changes at first, only they are trained, and the merged weights compute the same."""

import pytest
import torch
from torch import nn

from ssl_vit.models.lora import LoRALinear, add_lora, merge_lora


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Sequential(nn.Linear(7, 3, bias=False)), nn.LayerNorm(3))


def test_add_lora_changes_nothing_and_keeps_the_names():
    plain, x = model(), torch.randn(4, 5)
    before, names = plain(x), set(plain.state_dict())
    add_lora(plain, 2)
    assert torch.equal(plain(x), before)
    assert names < set(plain.state_dict())
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == {
        f"{layer}.{part}" for layer in ("0", "2.0") for part in ("lora_down", "lora_up")
    }


@pytest.mark.parametrize("rank", [1, 4])
def test_merge_lora_gives_the_weights_of_a_plain_model_that_computes_the_same(rank):
    trained, x = model(), torch.randn(4, 5)
    add_lora(trained, rank)
    for layer in (module for module in trained.modules() if isinstance(module, LoRALinear)):
        nn.init.normal_(layer.lora_up)
    merged = model()
    merged.load_state_dict(merge_lora(trained.state_dict()))  # strict
    torch.testing.assert_close(merged(x), trained(x))


def test_merge_lora_of_plain_weights_returns_them():
    state = model().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in merge_lora(state).items())
    assert merge_lora(state).keys() == state.keys()
