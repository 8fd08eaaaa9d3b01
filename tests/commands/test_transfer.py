"""Transfer: the table, names, and the `transfer` command with its cached results."""

import json
import shutil

import pytest
import torch
from torchvision.datasets import CIFAR10

from ssl_vit.cli import main
from ssl_vit.commands import linear
from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.transfer import TransferResult, pretraining_images, short_names, transfer_table
from ssl_vit.config.evaluate import TransferConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.errors import UserError
from tests.data.test_dataset_factory import make_cifar

QUICK = ("data.num_workers=0", "linear=[blocks=[1],l2=[1e-1,1e-3],solver=ridge]")


def cell(value=0.5, *, in_domain=False, n=100, split="train and test", warnings=()):
    return TransferResult(value, value - 0.1, value + 0.1, n, split, list(warnings), in_domain)


# --- table ---


def test_transfer_table_has_a_row_per_model_and_a_column_per_dataset():
    cells = {
        ("a", "birds"): cell(0.9, in_domain=True),
        ("a", "cars"): cell(0.25, n=1200),
        ("random-init", "birds"): cell(0.1, warnings=["look out"]),
    }
    text = transfer_table(["a", "random-init"], ["birds", "cars"], cells)
    assert text.splitlines()[:4] == [
        "| accuracy in %   |   birds (n = 100) |   cars (n = 1,200) |",
        "|:----------------|------------------:|-------------------:|",
        "| a               |   **90.0 ± 10.0** |        25.0 ± 10.0 |",
        "| random-init     |       10.0 ± 10.0 |                  – |",
    ]
    assert "**bold**: images that the model was pretrained on" in text
    assert "warning: random-init on birds: look out" in text


def test_transfer_table_notes_the_split():
    text = transfer_table(
        ["a"], ["birds", "cars"], {("a", "birds"): cell(split="0.2 of each class held out as test images")}
    )
    assert "birds: 0.2 of each class held out as test images." in text
    assert "cars:" not in text
    assert "bold" not in text


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([("x", "runs", "a"), ("x", "runs", "b")], ["a", "b"]),
        ([("x", "a"), ("y", "a"), ("y", "b")], ["x-a", "y-a", "y-b"]),
        ([("timm:vit_small.dino",), ("runs", "it's a=b")], ["timm-vit_small.dino", "it-s-a-b"]),
        ([("a",), ("b", "a")], ["a", "b-a"]),
    ],
)
def test_short_names_are_distinct(paths, names):
    assert short_names(paths) == names


def test_short_names_rejects_duplicates():
    with pytest.raises(UserError, match="x-a occurs twice"):
        short_names([("x", "a"), ("x", "a")])


@pytest.mark.parametrize("config", ["", "[]", "{}", "data: null", "data: {root: x}", "seed: 0", "[", None])
def test_pretraining_images_are_none_if_the_config_does_not_name_them(config, tmp_path):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert pretraining_images(tmp_path) is None
    assert pretraining_images(None) is None


# --- config ---


def test_transfer_config_takes_lists_of_paths_literally():
    overrides = [
        "checkpoints=[runs/a=1, my runs/b,2024,timm:vit_tiny_patch16_224]",
        "data.roots=[cifar10:my data,it's,[x]]",
    ]
    config = load_config("transfer", overrides, TransferConfig)
    assert config.checkpoints == ["runs/a=1", "my runs/b", "2024", "timm:vit_tiny_patch16_224"]
    assert config.data.roots == ["cifar10:my data", "it's", "[x]"]


# --- command ---


def export(backbone, path):
    export_backbone(backbone, path, mean=[0.5] * 3, std=[0.5] * 3, source="a test")


def config_of(path):
    return BackboneConfig.model_validate(json.loads(path.with_suffix(".json").read_text())["backbone"])


@pytest.fixture
def models(sample, tmp_path):
    """Return a run that was pretrained on the sample, and an exported file of the same architecture."""
    sizes = {"img_size": 48, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 32, "depth": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes)
    paths = [tmp_path / "my runs" / "lr=1" / "backbone.safetensors", tmp_path / "other.safetensors"]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        export(Backbone(config.model_copy(update={"drop_path": 0.1 * seed})), path)
    (paths[0].parent / "config.yaml").write_text(f"data: {{source: folder, root: {sample / 'train'}}}\n")
    return paths[0].parent, paths[1]


@pytest.fixture
def evaluated(monkeypatch):
    """Record the names of the results that are computed, in order."""
    names, evaluate = [], linear.evaluate

    def counted(config):
        names.append(config.out.name)
        return evaluate(config)

    monkeypatch.setattr(linear, "evaluate", counted)
    return names


def transfer(out, checkpoints, roots, *overrides):
    lists = (f"checkpoints=[{','.join(map(str, checkpoints))}]", f"data.roots=[{','.join(map(str, roots))}]")
    return main(["transfer", *QUICK, f"out={out}", *lists, *overrides])


def test_transfer_computes_only_what_changed(models, sample, tmp_path, evaluated, capsys):
    shutil.copytree(sample / "test", tmp_path / "one folder")
    roots, out = [sample, tmp_path / "one folder"], tmp_path / "out"
    assert transfer(out, models, roots) == 0
    name = sample.name
    rows = ["lr-1", "other", "random-init"]
    assert evaluated == [f"{row}-{data}.json" for row in rows for data in (name, "one-folder")]
    text = (out / "transfer.md").read_text()
    assert text in capsys.readouterr().out.replace(f"\n{out / 'transfer.md'}\n", "")
    lines = text.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == rows
    assert [line.count("**") for line in lines[2:5]] == [2, 0, 0]  # the diagonal: the run on what it was pretrained on
    assert "one-folder: 0.2 of each class held out as test images, seed 0." in text
    cells = json.loads((out / "transfer.json").read_text())["cells"]
    for found in cells:
        metric = json.loads((out / found["result"]).read_text())["score"]["metrics"][0]
        assert [found[key] for key in ("value", "low", "high", "n")] == [
            metric[key] for key in ("value", "low", "high", "n")
        ]
        assert found["in_domain"] == (found["model"] == "lr-1" and found["data"] == name)

    evaluated.clear()  # all are cached
    assert transfer(out, models, roots) == 0
    assert evaluated == []
    assert "6 pairs, 6 of them already evaluated" in capsys.readouterr().out
    assert (out / "transfer.md").read_text() == text

    (out / f"other-{name}.json").unlink()  # one deleted, one damaged, one of other images
    (out / f"random-init-{name}.json").write_text("{")
    next((tmp_path / "one folder" / "red-dots").iterdir()).unlink()
    assert transfer(out, models, roots) == 0
    assert set(evaluated) == {
        f"other-{name}.json",
        f"random-init-{name}.json",
        *(f"{row}-one-folder.json" for row in rows),
    }

    evaluated.clear()  # other weights under the same name
    torch.manual_seed(7)
    export(Backbone(config_of(models[1])), models[1])
    assert transfer(out, models, roots) == 0
    assert set(evaluated) == {f"other-{name}.json", "other-one-folder.json"}

    evaluated.clear()  # another probe
    assert transfer(out, models[:1], roots[:1], "linear=[blocks=[2],l2=[1e-2],solver=ridge]") == 0
    assert evaluated == [f"lr-1-{name}.json", f"random-init-{name}.json"]


def test_transfer_cell_equals_the_linear_command(models, sample, tmp_path):
    assert transfer(tmp_path / "out", models[1:], [sample]) == 0
    overrides = ["blocks=[1]", "l2=[1e-1,1e-3]", "solver=ridge", "data.num_workers=0", f"data.root={sample}"]
    overrides.append(f"out={tmp_path / 'linear.json'}")
    assert main(["linear", f"checkpoint={models[1]}", "baselines=false", *overrides]) == 0
    cell, alone = (
        json.loads(file.read_text())
        for file in (tmp_path / "out" / f"other-{sample.name}.json", tmp_path / "linear.json")
    )
    assert cell["score"] == alone["score"]
    assert cell["protocol_hash"] == alone["protocol_hash"]


def test_transfer_adds_a_random_model_per_architecture(models, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    make_cifar(tmp_path / "data", CIFAR10, monkeypatch)
    export(Backbone(config_of(models[1]).model_copy(update={"depth": 1})), tmp_path / "shallow.safetensors")
    checkpoints = [models[1], tmp_path / "shallow.safetensors", models[0]]
    assert transfer(tmp_path / "out", checkpoints, [f"cifar10:{tmp_path / 'data'}"]) == 0
    cells = json.loads((tmp_path / "out" / "transfer.json").read_text())["cells"]
    assert [(found["model"], found["data"], found["n"]) for found in cells] == [
        (name, "cifar10", 4) for name in ("other", "shallow", "lr-1", "random-init-other", "random-init-shallow")
    ]


def test_transfer_continues_after_a_failed_pair(models, sample, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    flat = Backbone(config_of(models[1]))
    flat.vit.patch_embed.proj.weight.data.zero_()
    export(flat, tmp_path / "flat" / "x.safetensors")
    assert transfer(tmp_path / "out", [tmp_path / "flat" / "x.safetensors", models[0]], [sample]) == 2
    error = capsys.readouterr().err
    assert "these pairs failed, all others are written" in error
    assert f"x on {sample.name}: " in error
    assert "collapsed" in error
    rows = (tmp_path / "out" / "transfer.md").read_text().splitlines()
    assert rows[2].split()[-2] == "–"
    assert "**" in rows[3]


@pytest.mark.parametrize(
    ("checkpoints", "roots", "message"),
    [
        (["{run}", "nowhere"], ["{sample}"], "checkpoint=nowhere: there is no such file or folder"),
        (["{run}"], ["{sample}", "nowhere"], "nowhere"),
        (["{run}"], ["{sample}/train/red-dots"], "labels are the names of two or more class folders"),
        (["{run}"], ["cifar10:"], "cifar10: needs a folder, as cifar10:FOLDER"),
        (["{run}"], ["cifar10:{sample}"], "cifar-10-batches-py lacks"),
        (["{run}", "{run}/."], ["{sample}"], "occurs twice"),
        (["{run}"], ["{sample}", "{sample}"], "occurs twice"),
        (["{run}"], [], "data.roots"),
    ],
)
def test_transfer_reports_user_errors_before_it_starts(
    models, sample, tmp_path, evaluated, capsys, checkpoints, roots, message
):
    filled = [[text.format(run=models[0], sample=sample) for text in texts] for texts in (checkpoints, roots)]
    assert transfer(tmp_path / "out", *filled) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert evaluated == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [("[blocks=[0]]", "blocks.0"), ("[seed=3]", "linear=[seed=3]: set this key"), ("[l3=1]", "l3")],
)
def test_transfer_reports_invalid_keys_of_the_probe(models, sample, tmp_path, capsys, overrides, message):
    assert transfer(tmp_path / "out", models, [sample], f"linear={overrides}") == 2
    assert message in capsys.readouterr().err


def test_transfer_rejects_several_processes(models, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert transfer(tmp_path / "out", models[:1], [sample]) == 2
    assert "transfer runs in one process" in capsys.readouterr().err
