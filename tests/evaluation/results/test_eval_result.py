"""Records say all of a result, in numbers that hold."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import KNNConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.eval_result import (
    EvalResult,
    Metric,
    ModelScores,
    Predictions,
    protocol_hash,
    sibling_path,
    topk_metrics,
)
from ssl_vit.evaluation.results.provenance import data_name, model_name, record_path
from ssl_vit.evaluation.results.statistics import wilson
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone, export_backbone, load_backbone

METRIC = Metric("top-1, k=20", 0.5, 100, 0.404, 0.596)
RECORD = EvalResult(
    task="knn",
    protocol={"k": [20], "split": "train and test"},
    model={"source": "runs/x"},
    data={"name": "photos", "n_train": 1000, "n_test": 100, "n_classes": 4},
    seeds={"pretrain": None, "evaluation": 0},
    score=ModelScores("model", [METRIC], {"k_effective": {20: 20}}),
    baselines=[ModelScores("raw pixels", [replace(METRIC, value=0.25)], {})],
    cost={"seconds": 1.5},
    environment={"device": "cpu"},
    warnings=["look out"],
)


def test_accuracies_count_ranks():
    ranks = torch.tensor([0, 0, 1, 4, 5, 9])
    top1, top5 = topk_metrics(ranks, 10, ", k=3")
    assert (top1.name, top1.value, top1.n) == ("top-1, k=3", pytest.approx(2 / 6), 6)
    assert (top5.name, top5.value) == ("top-5, k=3", pytest.approx(4 / 6))
    assert (top1.low, top1.high) == wilson(2, 6)


@pytest.mark.parametrize(("classes", "metrics"), [(2, 1), (5, 1), (6, 2)])
def test_top_5_needs_six_classes(classes, metrics):
    assert len(topk_metrics(torch.tensor([0, 1]), classes)) == metrics


def test_protocols_are_equal_in_any_order_and_differ_in_any_value():
    protocol = {"k": [10, 20], "temperature": 0.07, "transform": {"image_size": 32}}
    same = {"transform": {"image_size": 32}, "temperature": 0.07, "k": [10, 20]}
    assert protocol_hash("knn", protocol) == protocol_hash("knn", same)
    others = [protocol_hash("linear", protocol)]
    others += [protocol_hash("knn", {**protocol, **change}) for change in ({"k": [20]}, {"temperature": 0.1}, {"x": 1})]
    assert len({protocol_hash("knn", protocol), *others}) == 5


def test_written_record_can_be_read_and_no_half_of_it_is_left(tmp_path):
    path = tmp_path / "eval" / "knn-photos.json"
    RECORD.write(path)
    RECORD.write(path)
    content = json.loads(path.read_text())
    assert content["schema"] == 2
    assert content["tool"]["name"] == "ssl-vit"
    assert content["protocol_hash"] == protocol_hash("knn", RECORD.protocol)
    assert content["score"]["metrics"][0] == {
        "name": "top-1, k=20",
        "value": 0.5,
        "n": 100,
        "low": 0.404,
        "high": 0.596,
        "interval": "Wilson",
    }
    assert content["answers"] is None
    assert sorted(file.name for file in path.parent.iterdir()) == ["history.jsonl", "knn-photos.json"]


def test_the_moment_of_a_record_is_told_finer_than_a_second(tmp_path):
    """Of two of one model the later counts, however soon it came."""
    before = datetime.now(UTC)
    RECORD.write(tmp_path / "a.json")
    created = datetime.fromisoformat(json.loads((tmp_path / "a.json").read_text())["created"])
    assert before <= created <= datetime.now(UTC)


def test_table_shows_the_scores_side_by_side():
    lines = RECORD.table().splitlines()
    assert lines[0] == "knn on photos: 100 test images, 4 classes, 1,000 training images (train and test)"
    assert lines[2].split() == ["accuracy", "in", "%", "model", "raw", "pixels"]
    assert lines[3].split() == ["top-1,", "k=20", "50.0", "±", "9.6", "25.0"]
    assert lines[-1] == "warning: look out"


ANSWERS = Predictions(*(torch.tensor(part) for part in ([0, 2, 300], [1, 0, 1], [1, 1, 1], [0, 1, 0])))


def with_answers(**changes):
    return replace(RECORD, score=ModelScores("model", [METRIC], {}, {", k=20": ANSWERS}), **changes)


def test_what_was_answered_of_each_image_lies_beside_the_record(tmp_path):
    path = tmp_path / "knn-photos.json"
    with_answers().write(path)
    content = json.loads(path.read_text())
    assert "answers" not in content["score"]
    with np.load(tmp_path / content["answers"]) as arrays:
        assert str(arrays["id"]) == content["id"]
        for part, values in ANSWERS._asdict().items():
            saved = arrays[f"model, k=20/{part}"]
            assert saved.tolist() == values.tolist()
            assert saved.dtype == (np.uint16 if part == "place" else np.uint8)


def test_nothing_that_was_measured_is_lost_when_it_is_measured_again(tmp_path):
    path = tmp_path / "knn-photos.json"
    RECORD.write(path)
    replace(RECORD, protocol={"k": [1], "split": "train and test"}).write(path)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"cut off')
    replace(RECORD, task="linear").write(tmp_path / "linear-photos.json")
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert lines[2] == '{"cut off'
    first, second, third = (json.loads(line) for line in (lines[0], lines[1], lines[3]))
    assert [first["protocol"]["k"], second["protocol"]["k"], third["task"]] == [[20], [1], "linear"]
    assert second == json.loads(path.read_text())
    assert len({first["id"], second["id"], third["id"]}) == 3


def test_a_record_is_strict_json_whatever_was_found(tmp_path):
    odd = {"nan": float("nan"), "inf": [float("inf"), 1.0], 3: {"x": -float("inf")}, "name": "caf\udce9"}
    replace(RECORD, data={**RECORD.data, **odd}).write(tmp_path / "knn.json")

    def refuse(constant):
        raise AssertionError(constant)

    for text in (tmp_path / "knn.json").read_text(), (tmp_path / "history.jsonl").read_text():
        data = json.loads(text, parse_constant=refuse)["data"]
        assert (data["nan"], data["inf"], data["3"]) == (None, [None, 1.0], {"x": None})


def test_a_record_names_the_program_and_its_commit():
    tool = provenance.package_info()
    assert tool["name"] == "ssl-vit"
    if tool["git"] is not None:  # a checkout
        assert len(tool["git"]) == 40
        assert isinstance(tool["dirty"], bool)


@pytest.mark.parametrize(
    ("text", "seed"), [("seed: 7\n", 7), ("a: 1\n", None), ("[", None), ("- 1\n", None), ("seed: x\n", None)]
)
def test_the_seed_of_the_pretraining_is_told_where_it_is_known(text, seed, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert provenance.pretraining_seed(tmp_path) == seed


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["data.root=lab"], "lab"),
        (["data.root=lab/train"], "lab-train"),
        (["data.train=lab/train"], "lab-train"),
        (["data.train=lab/train", "data.test=lab/test"], "lab"),
        (["data.train=lab/train", "data.test=field/test"], "lab-field"),
        (["data.train=lab/good", "data.test=lab/bad"], "good-bad"),
        (["data.root=lab", "data.source=cifar10"], "cifar10"),
        (["data.root=shards", "data.source=shards"], "shards"),
        (["data.root=a\nb"], "a\\nb"),
    ],
)
def test_other_images_have_another_name(words, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_name(load_config("knn", ["checkpoint=x", *words], KNNConfig).data) == name


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run folder, and the same model as a file of its own."""
    sizes = {"img_size": 32, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 32, "depth": 1}
    backbone = Backbone(BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes))
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    half = [0.5, 0.5, 0.5]
    export_backbone(backbone, folder / "backbone.safetensors", mean=half, std=half, source="a test")
    (folder / "config.yaml").write_text("seed: 3\n")
    export_backbone(backbone, folder.parent / "my net.safetensors", mean=half, std=half, source="a test")
    return folder


def test_without_a_run_the_name_of_the_model_is_in_the_file(exported):
    def name(checkpoint, *words):
        config = load_config("knn", [f"checkpoint={checkpoint}", "data.root=lab", *words], KNNConfig)
        return record_path("knn", config, load_backbone(checkpoint, config.weights))

    file = exported.parent / "my net.safetensors"
    digest = load_backbone(str(file)).sha256[:8]
    assert name(str(exported)) == exported / "eval" / "knn-lab.json"
    assert name(str(exported), "weights=student") == exported / "eval" / "knn-lab-student.json"
    assert str(name(str(file))) == f"knn-lab-my-net-{digest}.json"
    assert str(name("random:vit_tiny_patch16_224")) == "knn-lab-random-vit_tiny_patch16_224.json"
    assert str(name(f"random:{exported}")) == "knn-lab-random-tiny.json"


def test_a_record_says_which_model_it_was(exported):
    loaded = load_backbone(str(exported))
    told = provenance.model_metadata(loaded, str(exported), "teacher")
    assert told["name"] == "tiny"
    assert told["run"] == str(exported)
    assert told["params"] == sum(parameter.numel() for parameter in loaded.backbone.parameters())
    assert told["state_sha256"] == loaded.backbone.state_sha256()
    assert (told["backbone"]["patch_size"], told["backbone"]["img_size"]) == (16, 32)


def test_a_timm_name_is_the_name_of_the_model():
    loaded = LoadedBackbone(None, [], [], "timm:vit_small_patch16_224.dino", None, None)
    name = model_name(loaded, "timm:vit_small_patch16_224.dino", "teacher")
    assert name == "vit_small_patch16_224.dino"
    assert sibling_path(Path(f"knn-{name}.json"), ".npz").name == f"knn-{name}.npz"
