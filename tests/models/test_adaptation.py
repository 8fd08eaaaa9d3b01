"""Weights for other image sizes, channels and registers, against timm's own functions."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.adaptation import adapt_backbone, adapt_filters
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.errors import UserError

CONFIG = BackboneConfig(
    name="vit_tiny_patch16_224",
    img_size=32,
    patch_size=8,
    in_chans=3,
    reg_tokens=0,
    drop_path=0.0,
    embed_dim=24,
    depth=2,
    num_heads=2,
    init="jax",
)


@pytest.fixture
def source():
    torch.manual_seed(0)
    return Backbone(CONFIG).eval()


def changed(**keys):
    return CONFIG.model_copy(update=keys)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_adapt_filters_of_rgb_equals_timm(channels):
    weight = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(adapt_filters(weight, channels), adapt_input_conv(channels, weight))


@pytest.mark.parametrize(("given", "channels"), [(3, 1), (3, 6), (1, 3), (2, 4), (4, 1)])
def test_adapt_filters_keep_the_output_of_equal_channels(given, channels):
    weight, gray = torch.randn(5, given, 4, 4), torch.randn(1, 1, 4, 4)
    before = (weight * gray).sum(dim=(1, 2, 3))
    torch.testing.assert_close((adapt_filters(weight, channels) * gray).sum(dim=(1, 2, 3)), before)


def test_adapt_backbone_of_the_same_shape_copies_every_weight_and_can_be_trained(source):
    copy = adapt_backbone(source.requires_grad_(False), changed(drop_path=0.2))
    for (name, ours), theirs in zip(copy.vit.state_dict().items(), source.vit.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(parameter.requires_grad for parameter in copy.parameters())
    assert copy.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("size", [16, 48, 64])
def test_adapt_backbone_stores_the_position_embeddings_that_timm_interpolates(source, size):
    stored = adapt_backbone(source, changed(img_size=size)).vit.pos_embed
    expected = resample_abs_pos_embed(source.vit.pos_embed, new_size=[size // 8, size // 8], num_prefix_tokens=1)
    assert (stored - expected).abs().max() < 1e-6
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        before, after = source(images), adapt_backbone(source, changed(img_size=size)).eval()(images)
    assert (before.patches - after.patches).abs().max() < 1e-5


def test_adapt_backbone_to_gray_computes_the_same_of_gray_images(source):
    gray = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        before, after = source(gray.expand(-1, 3, -1, -1)), adapt_backbone(source, changed(in_chans=1)).eval()(gray)
    torch.testing.assert_close(before.cls, after.cls, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [0, 2])
def test_adapt_backbone_adds_registers_and_keeps_all_other_tokens(given):
    torch.manual_seed(0)
    source = Backbone(changed(reg_tokens=given)).eval()
    more = adapt_backbone(source, changed(reg_tokens=given + 3)).vit
    old = source.vit
    assert more.reg_token.shape == (1, given + 3, 24)
    assert torch.equal(more.cls_token, old.cls_token)
    if given:
        assert torch.equal(more.reg_token[:, :given], old.reg_token)
    prefix = 1 + given
    assert torch.equal(more.pos_embed[:, :prefix], old.pos_embed[:, :prefix])
    assert not more.pos_embed[:, prefix : prefix + 3].any()
    assert torch.equal(more.pos_embed[:, prefix + 3 :], old.pos_embed[:, prefix:])


@pytest.mark.parametrize(
    "keys", [{"depth": 3}, {"embed_dim": 48}, {"patch_size": 16}, {"num_heads": 3}, {"name": "vit_small_patch16_224"}]
)
def test_adapt_backbone_refuses_another_architecture_in_one_line(source, keys):
    with pytest.raises(
        UserError, match=rf"backbone.{next(iter(keys))}=.*where the checkpoint has.*leave these keys out"
    ):
        adapt_backbone(source, changed(**keys))


def test_adapt_backbone_refuses_fewer_registers():
    with pytest.raises(UserError, match="reg_tokens=1, where the checkpoint has 2"):
        adapt_backbone(Backbone(changed(reg_tokens=2)), changed(reg_tokens=1))
