"""Maps equal those of DINO's own code at any image size."""

import math

import pytest
import timm
import torch

from ssl_vit.models.attention_maps import cls_attention
from ssl_vit.models.checkpoint import load_backbone, random_init_like
from ssl_vit.runtime.errors import UserError


def official_last_attention(vit, images):
    """Compute the attention (B, heads, tokens, tokens) of the last block as vision_transformer.py of DINO does."""
    _, _, w, h = images.shape
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(len(images), -1, -1), x], dim=1)
    npatch, n, dim = x.shape[1] - 1, vit.pos_embed.shape[1] - 1, x.shape[-1]
    position = vit.pos_embed
    if not (npatch == n and w == h):
        w0, h0 = w // 8 + 0.1, h // 8 + 0.1
        side = int(math.sqrt(n))
        patches = torch.nn.functional.interpolate(
            vit.pos_embed[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2),
            scale_factor=(w0 / math.sqrt(n), h0 / math.sqrt(n)),
            mode="bicubic",
        )
        assert (int(w0), int(h0)) == tuple(patches.shape[-2:])
        patches = patches.permute(0, 2, 3, 1).view(1, -1, dim)
        position = torch.cat((vit.pos_embed[:, :1], patches), dim=1)
    x = x + position
    for block in vit.blocks[:-1]:
        x = block(x)
    attention = vit.blocks[-1].attn
    qkv = attention.qkv(vit.blocks[-1].norm1(x)).reshape(*x.shape[:2], 3, attention.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)


@pytest.fixture
def vit(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2
    ).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    return vit


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 80), (16, 64), (64, 16), (24, 24)])
@torch.no_grad()
def test_official_positions_give_the_maps_of_dinos_code(vit, tmp_path, size):
    images = torch.rand(2, 3, *size)
    expected = official_last_attention(vit, images)[:, :, 0, 1:]  # sums to less than 1, by the share of [CLS]
    expected = (expected / expected.sum(-1, keepdim=True)).view(2, 2, size[0] // 8, size[1] // 8)
    official = load_backbone(tmp_path / "dino.pth", positions="official").backbone
    torch.testing.assert_close(cls_attention(official, images)[0], expected, rtol=0, atol=1e-6)
    default = cls_attention(load_backbone(tmp_path / "dino.pth").backbone, images)[0]
    assert torch.allclose(default, expected, rtol=0, atol=1e-6) == (size == (32, 32))


def test_official_positions_are_kept_by_the_random_baseline_and_refused_for_other_tokens(tmp_path, vit):
    loaded = load_backbone(tmp_path / "dino.pth", positions="official")
    assert random_init_like(loaded, 0).backbone.positions == "official"
    with pytest.raises(UserError, match=r"positions=official is for DINO's models"):
        load_backbone("random:vit_small_patch14_reg4_dinov2", positions="official")
