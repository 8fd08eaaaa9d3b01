"""Heads of DINO and SiT."""

import copy
import itertools

import torch

from ssl_vit.config.methods import DINOHeadConfig
from ssl_vit.methods.heads import DINOHead, Prototypes, ReconstructionHead
from tests.helpers.methods import dense


def test_prototypes_equal_weight_norm():
    """Old-style weight normalization with g = 1: the official last layer, without its trouble with deepcopy."""
    torch.manual_seed(0)
    ours = Prototypes(8, 5, norm_last_layer=False)
    linear = torch.nn.Linear(8, 5, bias=False)
    linear.weight.data.copy_(ours.weight_v.data)
    official = torch.nn.utils.parametrizations.weight_norm(linear)
    official.parametrizations.weight.original0.data.fill_(1)
    z = torch.randn(3, 8)
    torch.testing.assert_close(dense(ours(z)), official(z))
    torch.testing.assert_close(dense(copy.deepcopy(ours)(z)), official(z))


def dino_head(embed_dim, **sizes):
    return DINOHead(embed_dim, DINOHeadConfig(layers=3, norm_last_layer=True, **sizes))


def test_dino_head_has_the_official_names_and_returns_cosines():
    head = dino_head(16, prototypes=7, hidden_dim=12, bottleneck_dim=4)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (12, 16),
        "mlp.0.bias": (12,),
        "mlp.2.weight": (12, 12),
        "mlp.2.bias": (12,),
        "mlp.4.weight": (4, 12),
        "mlp.4.bias": (4,),
        "last_layer.weight_v": (7, 4),
        "last_layer.weight_g": (7, 1),
    }
    assert dense(head(torch.randn(50, 16))).abs().max() <= 1 + 1e-6
    assert not head.last_layer.weight_g.requires_grad


def test_dino_head_normalizes_in_float32_under_autocast():
    head = dino_head(64, prototypes=8, hidden_dim=32, bottleneck_dim=256)
    seen = []
    head.last_layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        head(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(seen[0].norm(dim=-1), torch.ones(100), rtol=0, atol=1e-5)


def test_reconstruction_head_is_a_linear_layer_per_patch():
    head = ReconstructionHead(6, patch_size=4, in_chans=3)
    tokens = torch.randn(2, 2 * 3, 6)
    images = head(tokens, (2, 3))
    assert images.shape == (2, 3, 8, 12)
    weight = head.deconvolution.weight.flatten(1)  # (D, C·P·P)
    bias = head.deconvolution.bias.repeat_interleave(16)
    for row, column in itertools.product(range(2), range(3)):
        patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        torch.testing.assert_close(patch, tokens[:, 3 * row + column] @ weight + bias)
