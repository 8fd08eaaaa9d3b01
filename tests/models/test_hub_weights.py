"""Weights of model hubs, with and without timm's config.json."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.errors import UserError

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}


def write_hub_folder(folder, config):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SIZES).eval()
    folder.mkdir(exist_ok=True)
    save_file(vit.state_dict(), folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return vit, str(folder / "model.safetensors")


def timm_config(**model_args):
    cfg = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    return {"architecture": "vit_tiny_patch16_224", "model_args": model_args, "pretrained_cfg": cfg}


def test_load_backbone_takes_architecture_and_normalization_from_timms_config(tmp_path):
    vit, path = write_hub_folder(tmp_path, timm_config(**SIZES))
    loaded = load_backbone(path)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded.backbone(images).cls, vit.forward_features(images)[:, 0], rtol=0, atol=2e-6)
    assert loaded.backbone.num_heads == 4  # of width 16, which the shapes do not tell
    assert loaded.mean == [0.5] * 3
    assert loaded.std == [0.25] * 3
    assert "vit_tiny_patch16_224, as in config.json" in loaded.source


@pytest.mark.parametrize("config", [None, {"model_type": "vit", "hidden_size": 64}, ["x"]])
def test_load_backbone_refuses_hub_weights_of_an_unknown_number_of_heads(tmp_path, config):
    vit, path = write_hub_folder(tmp_path, config)
    with pytest.raises(UserError, match=r"does not tell how many attention heads.*timm's config\.json, is missing"):
        load_backbone(path)
    images = torch.rand(1, 3, 32, 32)
    same = load_backbone(path, num_heads=4)
    torch.testing.assert_close(same.backbone(images).cls, vit.forward_features(images)[:, 0], rtol=0, atol=2e-6)
    assert "normalization as in DINO, assumed" in same.source


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "vit_of_tomorrow"}, "names vit_of_tomorrow, which timm .* does not know"),
        ({"architecture": "resnet18", "model_args": {}}, "resnet18 is not a plain ViT"),
        ({"model_args": {**SIZES, "checkpoint_path": "x"}}, "changes checkpoint_path of vit_tiny"),
        ({"model_args": {**SIZES, "depth": 3}}, "missing: blocks.2"),
        ({"model_args": [1]}, "no valid backbone"),
        ({"pretrained_cfg": {}}, "no valid backbone"),
    ],
)
def test_load_backbone_refuses_a_config_that_does_not_fit(tmp_path, change, words):
    _, path = write_hub_folder(tmp_path, timm_config(**SIZES) | change)
    with pytest.raises(UserError, match=words):
        load_backbone(path)
