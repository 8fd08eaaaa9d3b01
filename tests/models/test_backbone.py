"""Backbones of any plain timm ViT, at any size that is a multiple of the patch size."""

import functools

import pytest
import timm
import torch
from timm.layers import DropPath as TimmDropPath

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.methods.base import make_backbone
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.drop_path import DropPath, sample_drop_paths
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import sample_keys


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
def test_backbone_tokens_have_their_shapes_and_are_complete(registers, channels, size):
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


def test_get_intermediate_tokens_are_normalized_and_end_with_the_output():
    backbone = Backbone(tiny(reg_tokens=2)).eval()
    images = torch.rand(2, 3, 32, 32)
    states = []
    for block in backbone.vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: states.append(output))
    blocks = backbone.get_intermediate_tokens(images, 2)
    assert len(blocks) == 2
    for tokens, state in zip(blocks, states[-2:], strict=True):
        torch.testing.assert_close(tokens.cls, backbone.vit.norm(state)[:, 0])
        torch.testing.assert_close(tokens.patches, backbone.vit.norm(state)[:, 3:])
    torch.testing.assert_close(blocks[-1].cls, backbone(images).cls)


def test_set_fused_attention_does_not_change_the_output():
    backbone = Backbone(tiny(init="jax")).eval()
    images = torch.rand(2, 3, 32, 32)
    outputs = []
    for fused in (True, False):
        backbone.set_fused_attention(fused)
        outputs.append(backbone(images).patches)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_train_keeps_a_frozen_backbone_in_evaluation_mode():
    backbone = Backbone(tiny(drop_path=0.5)).requires_grad_(False).eval()
    backbone.train()
    assert not backbone.training
    assert Backbone(tiny()).train().training


def test_backbone_has_the_sizes_of_its_timm_name():
    backbone = Backbone(tiny(name="vit_small_patch32_224", embed_dim=None, depth=None, num_heads=None))
    plain = timm.create_model("vit_small_patch32_224", num_classes=0)
    assert backbone.embed_dim == plain.embed_dim
    assert backbone.num_blocks == len(plain.blocks)
    assert backbone.num_heads == plain.blocks[0].attn.num_heads


@pytest.mark.parametrize(
    "name",
    ["resnet50", "swin_tiny_patch4_window7_224", "vit_small_patch16_dinov3", "vit_small_patch16_18x2_224", "vit_x"],
)
def test_backbone_rejects_models_that_are_no_plain_vit(name):
    with pytest.raises(UserError, match=rf"^backbone.name={name}.*") as error:
        Backbone(tiny(name=name, embed_dim=None, depth=None, num_heads=None))
    assert "__init__" not in str(error.value)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_medium_patch16_gap_256"])
def test_make_backbone_rejects_models_without_a_pooled_class_token(name):
    config = tiny(name=name, embed_dim=48, depth=1, num_heads=3)
    assert not Backbone(config).has_cls
    with pytest.raises(UserError, match=rf"{name} has no class token"):
        make_backbone(config, drop_path=False)


def test_backbone_rejects_batch_norm(monkeypatch):
    """No plain ViT of timm has it today."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, norm_layer="batchnorm1d"))
    with pytest.raises(UserError, match="vit_tiny_patch16_224 has batch norm"):
        Backbone(tiny())


# --- drop path -------------------------------------------------------------------------------------------------

KEYS = sample_keys(0, 0, torch.arange(6))


def test_drop_path_has_timms_probabilities():
    ours = Backbone(tiny(drop_path=0.3, depth=5)).vit.blocks
    theirs = timm.create_model("vit_tiny_patch16_224", depth=5, drop_path_rate=0.3).blocks
    for block, expected in zip(ours[1:], theirs[1:], strict=True):
        assert isinstance(block.drop_path1, DropPath)
        assert block.drop_path1.drop_prob == block.drop_path2.drop_prob == expected.drop_path1.drop_prob
    assert isinstance(ours[0].drop_path1, torch.nn.Identity)
    assert not Backbone(tiny()).drop_paths


def test_drop_path_has_the_statistics_of_timms():
    """Each branch on its own: values, frequency, and independence between branches and images."""
    paths = [DropPath(p) for p in (0.1, 0.1, 0.5)]
    sample_drop_paths(paths, sample_keys(0, 0, torch.arange(20_000)), torch.device("cpu"))
    x = torch.ones(20_000, 2, 3)
    torch.manual_seed(0)
    outputs = []
    for path in paths:
        ours, theirs = path(x), TimmDropPath(path.drop_prob)(x)
        assert set(ours.unique().tolist()) == set(theirs.unique().tolist()) == {0, ours.max().item()}
        assert (ours == ours[:, :1, :1]).all()  # a whole image or nothing of it
        assert ours.mean().item() == pytest.approx(1, abs=0.03)
        for output in (ours, theirs):
            assert (output[:, 0, 0] == 0).float().mean().item() == pytest.approx(path.drop_prob, abs=0.015)
        outputs.append(ours[:, 0, 0])
    assert torch.corrcoef(torch.stack(outputs)).fill_diagonal_(0).abs().max() < 5 / 20_000**0.5
    assert paths[0].eval()(x) is x


def test_drop_path_depends_on_the_sample_key_alone():
    backbone = Backbone(tiny(drop_path=0.5)).double()
    images = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(0)
    whole = backbone(images, KEYS).cls
    parts = [backbone(images[rows], KEYS[rows]).cls for rows in ([4, 5], [1], [0, 2, 3])]
    torch.testing.assert_close(torch.cat(parts), whole[[4, 5, 1, 0, 2, 3]])
    assert not torch.allclose(backbone(images, KEYS + 1).cls, whole)
    assert not torch.allclose(backbone.eval()(images).cls, whole)


def test_drop_path_requires_keys_in_training_only():
    backbone = Backbone(tiny(drop_path=0.5))
    with pytest.raises(ValueError, match="keys"):
        backbone(torch.rand(2, 3, 32, 32))
    assert backbone.eval()(torch.rand(2, 3, 32, 32)).cls.shape == (2, 64)
    assert Backbone(tiny())(torch.rand(2, 3, 32, 32)).cls.shape == (2, 64)
