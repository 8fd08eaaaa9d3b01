"""Any plain timm ViT, its tokens by name, at any size that is a multiple of the patch."""

import pytest
import timm
import torch

from ssl_vit.config import BackboneConfig
from ssl_vit.errors import UserError
from ssl_vit.models.backbone import Backbone


def tiny(**changes):
    settings = {
        "name": "vit_tiny_patch16_224",
        "img_size": 32,
        "patch_size": 8,
        "in_chans": 3,
        "reg_tokens": 0,
        "drop_path": 0.0,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 1,
        "init": "timm",
    }
    return BackboneConfig(**(settings | changes))


@pytest.mark.parametrize("registers", [0, 1, 4])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 40)])
def test_tokens_are_named_and_complete(registers, channels, size):
    backbone = Backbone(tiny(reg_tokens=registers, in_chans=channels)).eval()
    images = torch.rand(2, channels, *size)
    tokens = backbone(images)
    rows, columns = size[0] // 8, size[1] // 8
    assert tokens.cls.shape == (2, 64)
    assert tokens.registers.shape == (2, registers, 64)
    assert tokens.patches.shape == (2, rows * columns, 64)
    assert tokens.grid == (rows, columns)
    whole = backbone.vit.forward_features(images)
    torch.testing.assert_close(torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1), whole)


def test_last_blocks_pass_the_final_norm_and_end_with_the_output():
    backbone = Backbone(tiny(reg_tokens=2)).eval()
    images = torch.rand(2, 3, 32, 32)
    states = []
    for block in backbone.vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: states.append(output))
    blocks = backbone.last_blocks(images, 2)
    assert len(blocks) == 2
    for tokens, state in zip(blocks, states[-2:], strict=True):
        torch.testing.assert_close(tokens.cls, backbone.vit.norm(state)[:, 0])
        torch.testing.assert_close(tokens.patches, backbone.vit.norm(state)[:, 3:])
    torch.testing.assert_close(blocks[-1].cls, backbone(images).cls)


def test_fused_and_plain_attention_compute_the_same():
    backbone = Backbone(tiny(init="jax")).eval()
    images = torch.rand(2, 3, 32, 32)
    outputs = []
    for fused in (True, False):
        backbone.set_fused_attention(fused)
        outputs.append(backbone(images).patches)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_stays_in_evaluation_mode():
    backbone = Backbone(tiny(drop_path=0.5)).requires_grad_(False).eval()
    backbone.train()
    assert not backbone.training
    assert Backbone(tiny()).train().training


def test_timm_models_by_name_keep_their_own_sizes():
    backbone = Backbone(tiny(name="vit_small_patch32_224", embed_dim=None, depth=None, num_heads=None))
    plain = timm.create_model("vit_small_patch32_224", num_classes=0)
    assert backbone.embed_dim == plain.embed_dim
    assert len(backbone.vit.blocks) == len(plain.blocks)


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224", "vit_base_patch16_siglip_224", "vit_x"])
def test_what_is_no_plain_vit_is_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        Backbone(tiny(name=name, embed_dim=None, depth=None, num_heads=None))
