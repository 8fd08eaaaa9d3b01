"""Another evaluation needs a function that scores, a config class, a command, a YAML and a row in the command table."""

import json
import sys

import pytest
import torch
import yaml

from ssl_vit.cli import COMMANDS, Command, main
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.export import export_backbone
from tests.helpers import toy_evaluation


@pytest.fixture
def centroid(monkeypatch, tmp_path):
    """Register the command; return the option that finds its YAML."""
    row = Command("config.centroid:CentroidConfig", "nearest class centroid", "ssl-vit centroid checkpoint=runs/photos")
    monkeypatch.setitem(COMMANDS, "centroid", row)
    for package in ("commands", "config"):  # where its files would be
        monkeypatch.setitem(sys.modules, f"ssl_vit.{package}.centroid", toy_evaluation)
    settings = {"checkpoint": None, "weights": "teacher", "normalize": True, "baselines": True, "seed": 0}
    defaults = ["_self_", {"eval_data": "folder"}, {"logger": "csv"}]
    folder = tmp_path / "conf"
    folder.mkdir()
    content = {"defaults": defaults, **settings, "out": None, "features": None}
    (folder / "centroid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return f"--config-dir={folder}"


@pytest.fixture
def runs(tmp_path):
    """Return two run directories with models of different weights."""
    sizes = {"img_size": 48, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 32, "depth": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes)
    folders = [tmp_path / "runs" / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        half = [0.5, 0.5, 0.5]
        export_backbone(Backbone(config), folder / "backbone.safetensors", mean=half, std=half, source="a test")
        (folder / "config.yaml").write_text("seed: 0\n")
    return folders


def test_toy_evaluation_is_written_compared_and_reported(centroid, runs, sample, tmp_path, capsys):
    for run in runs:
        assert main(["centroid", centroid, f"checkpoint={run}", f"data.root={sample}", "data.num_workers=0"]) == 0
    printed = capsys.readouterr().out
    assert f"centroid on {sample.name}" in printed
    path = runs[0] / "eval" / f"centroid-{sample.name}.json"
    assert str(path) in printed
    result = json.loads(path.read_text())
    assert result["title"] == "Nearest class centroid"
    assert [score["name"] for score in result["baselines"]] == ["random init", "raw pixels"]
    assert result["score"]["metrics"][0]["n"] == 48

    assert main(["centroid", centroid, f"checkpoint={runs[0]}", f"data.root={sample}", "normalise=false"]) == 2
    assert "normalise: unknown key; the nearest valid one is normalize" in capsys.readouterr().err

    assert main(["compare", *map(str, runs)]) == 0
    table = capsys.readouterr().out
    assert "centroid" in table
    assert f"{100 * result['score']['metrics'][0]['value']:.1f}" in table

    assert main(["report", f"run={runs[0]}", "inspect=false", "limit=2"]) == 0
    page = (runs[0] / "report.html").read_text()
    assert "Nearest class centroid" in page
    assert f"{100 * result['score']['metrics'][0]['value']:.1f}" in page
