"""Files in the layouts of DINOv2, iBOT and MAE, with random weights: equal to timm's conversion, or refused by name."""

import re

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.errors import UserError

SIZES = {"embed_dim": 128, "depth": 3, "num_heads": 2, "img_size": 28, "num_classes": 0, "dynamic_img_size": True}
IMAGES = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
LARGER = torch.rand(2, 3, 42, 56, generator=torch.Generator().manual_seed(1))


def dinov2(*, registers=0, gated=False):
    """A state in the official layout of DINOv2, with visible tokens and scales."""
    torch.manual_seed(0)
    name = f"vit_{'giant' if gated else 'small'}_patch14_dinov2"
    state = timm.create_model(name, **SIZES).state_dict()
    state = {key: torch.randn_like(value) * 0.05 for key, value in state.items()}
    state["mask_token"] = torch.zeros(1, 128)
    if registers:
        state["register_tokens"] = torch.randn(1, registers, 128)
    if gated:
        state = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for key, value in state.items()}
    return state


def by_timm(state, *, registers=0, gated=False):
    """The model of timm with these weights, converted by timm."""
    suffix = "_reg4" if registers else ""
    extra = {"reg_tokens": registers} if registers else {}
    model = timm.create_model(f"vit_{'giant' if gated else 'small'}_patch14{suffix}_dinov2", **SIZES, **extra).eval()
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    return model


def assert_same_tokens(backbone, model, images):
    tokens = backbone(images)
    ours = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
    with torch.no_grad():
        expected = model.forward_features(images)
    assert (ours - expected).abs().max() < 1e-6 * max(1, expected.abs().max())


KINDS = [{}, {"registers": 4}, {"registers": 2}, {"gated": True}, {"registers": 4, "gated": True}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["flat", "chunks of a training"])
def test_load_backbone_of_a_dinov2_file_equals_timm(tmp_path, kind, layout):
    state = dinov2(**kind)
    content = state
    if layout != "flat":
        chunk = {0: "0", 1: "0", 2: "1"}  # of each block
        names = {key: re.sub(r"blocks\.(\d)", lambda m: f"blocks.{chunk[int(m[1])]}.{m[1]}", key) for key in state}
        teacher = {f"backbone.{names[key]}": value for key, value in state.items()}
        content = {"teacher": teacher | {"dino_head.mlp.0.weight": torch.zeros(3, 3), "ibot_head.x": torch.zeros(1)}}
    torch.save(content, tmp_path / "any.pth")
    loaded = load_backbone(tmp_path / "any.pth")
    assert "2 attention heads, as in DINOv2" in loaded.source
    model = by_timm(state, **kind)
    assert_same_tokens(loaded.backbone, model, IMAGES)
    assert_same_tokens(loaded.backbone, model, LARGER)
    export_backbone(loaded.backbone, tmp_path / "x.safetensors", mean=loaded.mean, std=loaded.std, source="a test")
    assert_same_tokens(load_backbone(tmp_path / "x.safetensors").backbone, model, LARGER)


def plain(**sizes):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SIZES | {"img_size": 32, "patch_size": 8} | sizes).eval()
    torch.nn.init.normal_(model.cls_token)
    return model


IBOT = {"masked_embed": torch.zeros(1, 128), "head.mlp.0.weight": torch.zeros(2, 2)}
MAE = {
    "mask_token": torch.zeros(1, 1, 64),
    "decoder_embed.weight": torch.zeros(64, 128),
    "decoder_pos_embed": torch.zeros(1, 17, 64),
    "decoder_blocks.0.norm1.weight": torch.zeros(64),
}


@pytest.mark.parametrize(
    ("family", "content"),
    [
        ("iBOT", lambda state: {"state_dict": state | IBOT}),
        ("iBOT", lambda state: {"teacher": {f"module.backbone.{key}": value for key, value in (state | IBOT).items()}}),
        ("MAE", lambda state: {"model": state | MAE, "epoch": 3}),
    ],
)
def test_load_backbone_of_ibot_and_mae_files_equals_timm(tmp_path, family, content):
    model = plain()
    torch.save(content(model.state_dict()), tmp_path / "any.pth")
    loaded = load_backbone(tmp_path / "any.pth")
    assert f"2 attention heads, as in {family}" in loaded.source
    assert ("non-commercial" in loaded.source) == (family == "MAE")
    images = torch.rand(2, 3, 32, 32)
    assert_same_tokens(loaded.backbone, model, images)


def test_load_backbone_of_an_encoder_of_mae_goes_by_its_name(tmp_path):
    torch.save({"model": plain().state_dict()}, tmp_path / "mae_pretrain_vit_base.pth")
    assert "as in MAE" in load_backbone(tmp_path / "mae_pretrain_vit_base.pth").source
    torch.save({"model": plain().state_dict()}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match="does not tell how many attention heads"):
        load_backbone(tmp_path / "vit.pth")


@pytest.mark.parametrize("kind", [{}, {"registers": 4}])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("blocks.1.ls2.gamma"), "missing: blocks.1.ls2.gamma"),
        (lambda state: state.update({"blocks.1.extra": torch.zeros(1)}), "unexpected: blocks.1.extra"),
        (lambda state: state.update({"norm.weight": torch.zeros(64)}), r"norm.weight \(64,\) instead of \(128,\)"),
        (lambda state: state["norm.weight"].fill_(float("nan")), "not finite"),
    ],
)
def test_load_backbone_refuses_a_changed_dinov2_file_by_name(tmp_path, kind, change, expected):
    state = dinov2(**kind)
    change(state)
    torch.save(state, tmp_path / "any.pth")
    with pytest.raises(UserError, match=expected):
        load_backbone(tmp_path / "any.pth")
