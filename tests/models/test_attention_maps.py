"""Attention maps from a model that keeps its fused attention, masks of them, and the way from patches to pixels."""

import pytest
import torch

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.attention_maps import (
    attention_mass_mask,
    attention_weights,
    capture_qk,
    cls_attention,
    cls_attention_from_qk,
    extract_last_block,
    patch_of_pixel,
    resize_to_patch_multiple,
    topk_mask,
    upsample_mask,
)
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.errors import UserError


def make_backbone(registers: int = 0, name: str = "vit_tiny_patch16_224", scale: float = 2.0) -> Backbone:
    """A small model whose attention is far from uniform."""
    config = BackboneConfig(
        name=name,
        img_size=32,
        patch_size=8,
        in_chans=3,
        reg_tokens=registers,
        drop_path=0.0,
        embed_dim=48,
        depth=2,
        num_heads=3,
        init="jax",
    )
    torch.manual_seed(0)
    backbone = Backbone(config).eval()
    torch.nn.init.normal_(backbone.vit.cls_token)
    for block in backbone.vit.blocks:
        block.attn.qkv.weight.data *= scale
    return backbone


def plain_attention(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """The [CLS] row of the softmax matrix that timm itself forms in the last block without fused attention."""
    seen = []
    attention = backbone.vit.blocks[-1].attn
    handle = attention.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    attention.fused_attn = False
    with torch.no_grad():
        backbone(images)
    attention.fused_attn = True
    handle.remove()
    row = seen[0][:, :, 0, 1 + backbone.config.reg_tokens :]
    return row / row.sum(-1, keepdim=True)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [(32, 32), (24, 72), (8, 8), (80, 40)])
def test_cls_attention_equals_the_unfused_softmax(size, registers):
    backbone = make_backbone(registers)
    images = torch.randn(2, 3, *size)
    maps = cls_attention(backbone, images)[0]
    assert maps.shape == (2, 3, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(maps.flatten(2), plain_attention(backbone, images), atol=1e-6, rtol=0)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 3))


def test_cls_attention_applies_query_and_key_norms():
    backbone = make_backbone()
    attention = backbone.vit.blocks[-1].attn
    attention.q_norm, attention.k_norm = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
    images = torch.randn(1, 3, 32, 32)
    expected = plain_attention(backbone, images)
    torch.testing.assert_close(cls_attention(backbone, images)[0].flatten(2), expected, atol=1e-6, rtol=0)


def test_cls_attention_is_defined_when_cls_attends_only_to_itself():
    """In float32 the softmax over all tokens is then exactly zero on every patch."""
    backbone = make_backbone()
    queries, keys = torch.randn(2, 1, 3, 17, 16).unbind()
    queries[:, :, 0] = keys[:, :, 0] = 40.0
    assert (attention_weights(queries[:, :, :1], keys)[..., 1:] == 0).all()
    row = cls_attention_from_qk(backbone, queries, keys)
    torch.testing.assert_close(row.sum(-1), torch.ones(1, 3))
    expected = (queries[:, :, :1].double() @ keys[:, :, 1:].double().mT / 4).softmax(-1)[:, :, 0]
    torch.testing.assert_close(row.double(), expected, atol=1e-5, rtol=0)


def test_capture_qk_removes_its_hooks():
    backbone = make_backbone()
    images = torch.randn(1, 3, 32, 32)
    before = backbone(images).cls
    cls_attention(backbone, images)[0]
    with pytest.raises(AssertionError, match="divisible"):
        cls_attention(backbone, torch.randn(1, 3, 33, 32))
    assert all(block.attn.fused_attn for block in backbone.vit.blocks)
    assert not any(module._forward_hooks for module in backbone.modules())
    torch.testing.assert_close(backbone(images).cls, before)


def test_cls_attention_is_float32_under_autocast():
    backbone = make_backbone(scale=1.5)
    images = torch.randn(2, 3, 32, 64)
    exact = cls_attention(backbone, images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        maps = cls_attention(backbone, images)[0]
    assert maps.dtype == torch.float32
    # A softmax in bfloat16 would round each weight to 8 bits: its sums and its values would be off by 2^-9.
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 3), atol=1e-6, rtol=0)
    assert not torch.equal(maps, maps.bfloat16().float())
    torch.testing.assert_close(maps, exact, atol=0.02, rtol=0.3)


@pytest.mark.parametrize("fused", [True, False])
def test_cls_attention_of_all_blocks_needs_one_pass(fused):
    backbone = make_backbone(registers=2)
    images = torch.randn(2, 3, 32, 40)
    backbone.set_fused_attention(fused)
    maps = cls_attention(backbone, images, blocks=range(2))
    assert maps.shape == (2, 2, 3, 4, 5)
    torch.testing.assert_close(maps[1], cls_attention(backbone, images)[0])
    torch.testing.assert_close(maps[0], cls_attention(backbone, images, blocks=[0])[0])
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)


@pytest.mark.parametrize("registers", [0, 3])
def test_extract_last_block_separates_images_and_patches(registers):
    backbone = make_backbone(registers)
    images = torch.randn(2, 3, 16, 40)
    outputs = extract_last_block(backbone, images)
    tokens = backbone(images)
    keys = []
    with capture_qk(backbone, lambda _block, _queries, key: keys.append(key), blocks=[1]):
        backbone(images)
    for index, output in enumerate(outputs):
        torch.testing.assert_close(output.patches.flatten(0, 1), tokens.patches[index])
        torch.testing.assert_close(output.cls, cls_attention(backbone, images)[0, index])
        assert output.keys.shape == (3, 2, 5, 16)
        torch.testing.assert_close(output.keys[:, 1, 2], keys[0][index, :, 1 + registers + 7])


def test_extract_last_block_without_a_class_token():
    config = make_backbone().config
    gap = Backbone(config.model_copy(update={"name": "vit_medium_patch16_gap_256"})).eval()
    (output,) = extract_last_block(gap, torch.randn(1, 3, 16, 24))
    assert output.cls is None
    assert output.keys.shape == (3, 2, 3, 16)
    assert output.patches.shape == (2, 3, 48)
    with pytest.raises(UserError, match="no class token"):
        gap.require_cls()


def test_capture_qk_rejects_other_attention():
    backbone = make_backbone()
    backbone.vit.blocks[-1].attn = torch.nn.Identity()
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224.*softmax attention"):
        cls_attention(backbone, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("size", "max_side", "fitted"),
    [
        ((32, 48), None, (32, 48)),
        ((300, 401), None, (304, 400)),
        ((17, 25), None, (16, 32)),
        ((16, 16), None, (16, 16)),
        ((300, 400), 200, (144, 192)),
        ((300, 400), 500, (304, 400)),
    ],
)
def test_resize_to_patch_multiple_rounds_to_the_nearest(size, max_side, fitted):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    result = resize_to_patch_multiple(image, 16, max_side)
    assert result.shape == (3, *fitted)
    assert result.dtype == torch.uint8
    if size == fitted:
        assert torch.equal(result, image)


@pytest.mark.parametrize(("size", "max_side"), [((15, 40), None), ((200, 40), 60)])
def test_resize_to_patch_multiple_rejects_images_smaller_than_a_patch(size, max_side):
    with pytest.raises(UserError, match=r"40 x .*smaller than one patch of 16 pixels"):
        resize_to_patch_multiple(torch.zeros(3, *size, dtype=torch.uint8), 16, max_side)


def slow_mass_mask(values: list[float], mass: float) -> list[bool]:
    """Take the largest value again and again until the mass is reached."""
    left = dict(enumerate(values))
    taken = set()
    while sum(values[i] for i in taken) < mass * sum(values):
        best = max(left, key=left.get)
        del left[best]
        taken.add(best)
    return [i in taken for i in range(len(values))]


@pytest.mark.parametrize("mass", [0.05, 0.37, 0.6, 0.95])
def test_attention_mass_mask_equals_the_slow_loop(mass):
    maps = torch.rand(20, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    for map_, mask in zip(maps, attention_mass_mask(maps, mass), strict=True):
        assert mask.flatten().tolist() == slow_mass_mask(map_.flatten().tolist(), mass)


def test_attention_mass_mask_has_the_fewest_patches():
    maps = torch.rand(50, 6, 5, generator=torch.Generator().manual_seed(1)).double()
    maps /= maps.sum((-2, -1), keepdim=True)
    masks = attention_mass_mask(maps, 0.6)
    held = (maps * masks).sum((-2, -1))
    smallest = torch.where(masks, maps, 2).amin((-2, -1))
    assert (held >= 0.6).all()
    assert (held - smallest < 0.6).all()


def test_attention_mass_mask_of_a_single_attended_patch():
    one = torch.zeros(2, 3)
    one[1, 2] = 5
    assert attention_mass_mask(one, 0.6).nonzero().tolist() == [[1, 2]]


def test_topk_mask_selects_the_largest():
    maps = torch.rand(3, 4, 5)
    for count in (1, 7, 20):
        masks = topk_mask(maps, count)
        assert masks.sum((-2, -1)).tolist() == [count] * 3
        assert (torch.where(masks, maps, 2).amin((-2, -1)) >= torch.where(masks, -1, maps).amax((-2, -1))).all()
    assert topk_mask(torch.ones(2, 2), 3).sum() == 3


@pytest.mark.parametrize(("pixels", "patches"), [(32, 4), (33, 4), (139, 9), (400, 25), (7, 7), (300, 19)])
def test_patch_of_pixel_is_the_nearest_center(pixels, patches):
    centers = (torch.arange(patches) + 0.5) * pixels / patches
    distance = (torch.arange(pixels)[:, None] + 0.5 - centers).abs()
    chosen = distance.gather(1, patch_of_pixel(pixels, patches)[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, distance.amin(1))
    assert patch_of_pixel(pixels, patches).unique().numel() == patches


def test_upsample_mask_repeats_patches():
    masks = torch.rand(2, 3, 4) > 0.5
    large = upsample_mask(masks, (6, 12))
    assert torch.equal(large, masks.repeat_interleave(2, 1).repeat_interleave(3, 2))
