"""Loading backbones from all supported files, and exports that bare timm loads."""

import argparse
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from ssl_vit.cli import main
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import load_backbone, random_init_like
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.errors import UserError
from tests.models.test_backbone import tiny

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plain():
    """A timm ViT with random weights, its [CLS] token made visible."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=1
    ).eval()
    torch.nn.init.normal_(vit.cls_token)
    return vit


def assert_same_tokens(loaded, vit):
    tokens = loaded.backbone(IMAGES)
    ours = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
    torch.testing.assert_close(ours, vit.forward_features(IMAGES), rtol=0, atol=2e-6)
    assert not loaded.backbone.training
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


DINO_HEAD = {"mlp.0.weight": torch.zeros(8, 64), "last_layer.weight_g": torch.ones(16, 1)}


def test_load_backbone_reads_an_official_dino_backbone(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "dino.pth")
    assert_same_tokens(load_backbone(str(tmp_path / "dino.pth")), plain)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_load_backbone_reads_an_official_dino_checkpoint(plain, tmp_path, which):
    """Both models, prefixes `module.` and `backbone.`, the head, the center and an argparse.Namespace."""
    other = {key: torch.zeros_like(value) for key, value in plain.state_dict().items()}
    states = {name: plain.state_dict() if name == which else other for name in ("teacher", "student")}
    content = {
        "student": prefixed(states["student"], "module.backbone.") | prefixed(DINO_HEAD, "module.head."),
        "teacher": prefixed(states["teacher"], "backbone.") | prefixed(DINO_HEAD, "head."),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4),
        "dino_loss": {"center": torch.zeros(1, 16)},
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    loaded = load_backbone(str(tmp_path / "checkpoint.pth"), which)
    assert_same_tokens(loaded, plain)
    assert which in loaded.source


@pytest.mark.parametrize("nested", [True, False])
def test_load_backbone_reads_an_official_sit_v1_file(tmp_path, nested):
    """[rotation, contrastive, patches] becomes timm's [class, register, patches], position rows included."""
    torch.manual_seed(1)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=1,
        reg_tokens=1,
    ).eval()
    for token in (vit.cls_token, vit.reg_token):
        torch.nn.init.normal_(token)
    state = vit.state_dict()
    position = state.pop("pos_embed")
    official = state | {
        "rot_token": state.pop("reg_token"),
        "contrastive_token": state.pop("cls_token"),
        "pos_embed": torch.cat([position[:, 1:2], position[:, 0:1], position[:, 2:]], 1),
        "rot_head.weight": torch.zeros(4, 64),
        "contrastive_head.weight": torch.zeros(512, 64),
        "convTrans.weight": torch.zeros(64, 3, 8, 8),
        "rot_w": torch.ones(1),
        "contrastive_w": torch.ones(1),
        "recons_w": torch.ones(1),
    }
    torch.save({"model": official, "epoch": 3} if nested else official, tmp_path / "sit.pth")
    assert_same_tokens(load_backbone(str(tmp_path / "sit.pth")), vit)


def test_export_backbone_writes_the_lines_that_load_it_in_bare_timm(tmp_path, monkeypatch):
    torch.manual_seed(2)
    backbone = Backbone(tiny(reg_tokens=1, init="jax")).eval()
    export_backbone(backbone, tmp_path / "w.safetensors", mean=[0.5] * 3, std=[0.2] * 3, source="a test")
    sidecar = json.loads((tmp_path / "w.json").read_text())
    monkeypatch.chdir(tmp_path)
    scope = {"timm": timm, "safetensors": safetensors}
    for line in sidecar["load"]:
        exec(line, scope)
    torch.testing.assert_close(
        scope["model"].eval()(IMAGES), backbone(IMAGES).cls, rtol=0, atol=0
    )  # timm pools the class token
    loaded = load_backbone(str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(loaded.backbone(IMAGES).patches, backbone(IMAGES).patches, rtol=0, atol=0)
    assert (loaded.mean, loaded.std) == ([0.5] * 3, [0.2] * 3)
    kept = {key: value for key, value in sidecar.items() if key not in ("sha256", "value_range")}
    old = {("normalisation" if key == "normalization" else key): value for key, value in kept.items()}
    (tmp_path / "w.json").write_text(json.dumps(old))  # as version 0.1 wrote it
    weights = safetensors.torch.load_file(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(safetensors.torch.save(weights))  # without a description
    assert load_backbone(str(tmp_path / "w.safetensors")).std == [0.2] * 3


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_load_backbone_reads_the_numpy_scalars_of_a_full_dino_checkpoint(plain, tmp_path, module):
    """DINO's training leaves them in its optimizer groups; their module has another name since NumPy 2."""
    group = {"lr": np.float64(1e-4), "weight_decay": np.float32(0.1), "step": np.int64(3), "fused": np.bool_(False)}
    content = {
        "teacher": prefixed(plain.state_dict(), "backbone."),
        "student": prefixed(plain.state_dict(), "module.backbone."),
        "optimizer": {"state": {}, "param_groups": [group]},
        "args": argparse.Namespace(arch="vit_small"),
    }
    torch.save(content, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "checkpoint.pth", "w") as file:
        for name in new.namelist():
            file.writestr(name, new.read(name).replace(b"cnumpy._core.multiarray\n", b"c" + module + b"\n"))
    assert_same_tokens(load_backbone(str(tmp_path / "checkpoint.pth")), plain)


def test_load_backbone_names_the_class_that_it_does_not_read(tmp_path):
    torch.save({"teacher": {}, "folder": Path("x")}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"contains pathlib\.\w+, which is not read, as it could run code"):
        load_backbone(str(tmp_path / "a.ckpt"))


def test_load_backbone_refuses_a_file_that_does_not_tell_the_number_of_heads(plain, tmp_path, capsys):
    """Shapes are equal for any number of heads, and the attention is another one."""
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_classes": 0}
    four = timm.create_model("vit_tiny_patch16_224", num_heads=4, dynamic_img_size=True, **kwargs).eval()
    torch.save({"model": four.state_dict()}, tmp_path / "moco.pth")
    with pytest.raises(UserError, match=r"does not tell how many attention heads.*num_heads=1 out="):
        load_backbone(str(tmp_path / "moco.pth"))
    out = tmp_path / "backbone.safetensors"
    assert main(["export", f"checkpoint={tmp_path / 'moco.pth'}", "num_heads=4", f"out={out}"]) == 0
    assert_same_tokens(load_backbone(str(out)), four)
    assert main(["export", f"checkpoint={tmp_path / 'moco.pth'}", "num_heads=5", f"out={out}"]) == 2
    assert "num_heads=5 does not divide the width 64" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_backbone_refuses_weights_that_are_not_finite(plain, tmp_path, value):
    state = plain.state_dict()
    state["blocks.0.norm1.weight"] = torch.full((64,), value)
    torch.save(state, tmp_path / "dino_nan.pth")
    with pytest.raises(UserError, match=r"1 of \d+ weights are not finite \(blocks\.0\.norm1\.weight\)"):
        load_backbone(str(tmp_path / "dino_nan.pth"))


def test_load_backbone_refuses_an_export_whose_weights_changed(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "dino.pth")
    out = tmp_path / "backbone.safetensors"
    assert main(["export", f"checkpoint={tmp_path / 'dino.pth'}", f"out={out}"]) == 0
    weights = safetensors.torch.load_file(out)
    weights["blocks.0.norm1.weight"][0] *= -1
    safetensors.torch.save_file(weights, out)
    with pytest.raises(UserError, match=r"damaged or replaced, as backbone\.json has another SHA-256"):
        load_backbone(str(out))


def test_export_command_replaces_only_its_own_files_unless_told(plain, tmp_path, capsys):
    torch.save(plain.state_dict(), tmp_path / "dino.pth")
    out = tmp_path / "backbone.safetensors"
    command = ["export", f"checkpoint={tmp_path / 'dino.pth'}", f"out={out}"]
    out.write_bytes(b"precious")
    assert main(command) == 2
    assert out.read_bytes() == b"precious"
    assert "overwrite=true replaces it" in capsys.readouterr().err
    assert main([*command, "overwrite=true"]) == 0
    assert main(command) == 0


FOREIGN = {
    "storage_tokens patch_embed.proj.weight": "DINOv3 file",
    "rope_embed.periods cls_token": "DINOv3 file",
    "embeddings.cls_token encoder.layer.0.x": "transformers library",
    "module.base_encoder.cls_token": "MoCo v3",
    "_orig_mod.cls_token": "compiled model",
}


@pytest.mark.parametrize("keys", FOREIGN)
def test_load_backbone_names_files_of_other_tools(keys, tmp_path):
    torch.save({key: torch.zeros(384, 3, 14, 14) for key in keys.split()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=FOREIGN[keys]):
        load_backbone(str(tmp_path / "a.pth"))
    torch.save({"state_dict": {"net.x": torch.zeros(1)}, "pytorch-lightning_version": "2.0"}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="Lightning checkpoint of another tool"):
        load_backbone(str(tmp_path / "b.ckpt"))


def test_export_command_converts_an_official_file(plain, tmp_path, capsys):
    torch.save(plain.state_dict(), tmp_path / "dino.pth")
    out = tmp_path / "new" / "backbone.safetensors"
    assert main(["export", f"checkpoint={tmp_path / 'dino.pth'}", f"out={out}"]) == 0
    assert "timm.create_model" in capsys.readouterr().out
    assert_same_tokens(load_backbone(str(out)), plain)


def test_load_backbone_gets_pretrained_weights_from_timm(tmp_path, monkeypatch, plain):
    """The pretrained weights come from a file instead of the hub."""
    torch.manual_seed(3)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=1000).eval()
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "model.safetensors")
    original = timm.create_model

    def from_file(name, pretrained=False, **kwargs):
        overlay = {"file": str(tmp_path / "model.safetensors"), "hf_hub_id": None, "url": ""} if pretrained else None
        return original(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)

    monkeypatch.setattr(timm, "create_model", from_file)
    loaded = load_backbone("timm:vit_tiny_patch16_224")
    images = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(loaded.backbone(images).patches, vit.forward_features(images)[:, 1:])
    assert loaded.mean == [0.5, 0.5, 0.5]  # of this timm model, not ImageNet's


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "resnet18", "vit_small_r26_s32_224"])
def test_load_backbone_rejects_other_timm_models_before_the_download(name, monkeypatch):
    original = timm.create_model

    def without_model(name, pretrained=False, **kwargs):
        assert not pretrained
        return original(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", without_model)
    with pytest.raises(UserError, match=f"checkpoint=timm:{name}: {name} is not a plain ViT"):
        load_backbone(f"timm:{name}")


def test_load_backbone_rejects_an_unknown_pretrained_tag():
    with pytest.raises(UserError, match=r"224\.snow cannot be loaded: Invalid pretrained tag"):
        load_backbone("timm:vit_tiny_patch16_224.snow")


def test_random_init_like_depends_on_the_seed_and_keeps_the_global_generator(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "dino.pth")
    loaded = load_backbone(str(tmp_path / "dino.pth"))
    before = torch.get_rng_state()
    first, again, other = (random_init_like(loaded, seed).backbone(IMAGES).cls for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    by_name = load_backbone(f"random:{tmp_path / 'dino.pth'}").backbone(IMAGES).cls
    assert torch.equal(by_name, first)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def write(name, content):
    def make(folder):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing.ckpt", "there is no such file"),
        (lambda folder: folder, "no checkpoints/last.ckpt"),
        (write("empty.pth", b""), "not a checkpoint"),
        (write("text.pth", b"some text"), "not a checkpoint"),
        (write("code.pth", Bomb()), "could run code"),
        (write("code.ckpt", {"teacher": {}, "callback": Bomb()}), "could run code"),
        (write("list.pth", [1, 2]), "not a checkpoint"),
        (write("resnet.pth", {"conv1.weight": torch.zeros(64, 3, 7, 7)}), "conv1.weight"),
        (write("alone.safetensors", safetensors.torch.save({"a": torch.zeros(1)})), "alone.json of `ssl-vit export`"),
    ],
)
def test_load_backbone_rejects_other_files_without_running_code(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_backbone(str(make(tmp_path)))
    assert not (tmp_path / "exploded").exists()


def test_load_backbone_lists_keys_that_do_not_match(plain, tmp_path):
    state = plain.state_dict()
    del state["blocks.1.attn.qkv.bias"]
    state["blocks.0.extra"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "dino_odd.pth")
    with pytest.raises(UserError) as error:
        load_backbone(str(tmp_path / "dino_odd.pth"))
    text = str(error.value)
    assert "missing: blocks.1.attn.qkv.bias" in text
    assert "unexpected: blocks.0.extra" in text
    assert "norm.weight (3,) instead of (64,)" in text


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "vit_small_patch16_dinov3"])
def test_load_backbone_names_the_random_source_in_its_message(name):
    with pytest.raises(UserError, match=f"checkpoint=random:{name}: {name} is not a plain ViT") as error:
        load_backbone(f"random:{name}")
    assert "timm:" not in str(error.value)


def test_load_backbone_requires_a_class_token_by_default():
    name = "random:vit_medium_patch16_gap_256"
    with pytest.raises(UserError, match="no class token"):
        load_backbone(name)
    assert not load_backbone(name, require_cls=False).backbone.has_cls


@pytest.mark.parametrize(
    "change",
    [
        lambda side: side["backbone"].update(num_heads=6),
        lambda side: side["backbone"].update(num_heads=None),
        lambda side: side["normalization"].update(mean=[50.0, -3.0, 9.0]),
        lambda side: side.update(value_range="[0, 9]"),
        lambda side: side.pop("value_range"),
    ],
)
def test_load_backbone_refuses_a_side_file_that_describes_another_model(change, tiny_model, tmp_path):
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"x{suffix}").write_bytes(tiny_model.with_suffix(suffix).read_bytes())
    side = json.loads((tmp_path / "x.json").read_text())
    change(side)
    (tmp_path / "x.json").write_text(json.dumps(side))
    with pytest.raises(UserError, match=r"x.json describes another architecture or normalization"):
        load_backbone(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["nonsense", "{}", "[1]", '{"backbone": {"name": "vit"}, "normalization": {}}'])
def test_load_backbone_rejects_a_json_file_of_another_tool(text, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match="not a file of `ssl-vit export`"):
        load_backbone(str(tmp_path / "other.safetensors"))
