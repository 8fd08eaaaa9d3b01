"""Results: their JSON, predictions, history, table, and provenance."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import KNNConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.eval_result import (
    DataInfo,
    EvalResult,
    Metric,
    ModelInfo,
    ModelScores,
    Predictions,
    sibling_path,
    topk_metrics,
)
from ssl_vit.evaluation.results.provenance import data_name, model_name, result_path
from ssl_vit.evaluation.results.result_reader import read_result
from ssl_vit.evaluation.results.statistics import wilson
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.errors import UserError
from tests.helpers.results import changed

METRIC = Metric(name="top-1, k=20", value=0.5, n=100, low=0.404, high=0.596)
RESULT = EvalResult(
    task="knn",
    protocol={"k": [20], "split": "train and test"},
    model=ModelInfo(name="x", source="runs/x"),
    data=DataInfo(name="photos", n_train=1000, n_test=100, n_classes=4),
    seeds={"pretrain": None, "evaluation": 0},
    score=ModelScores(name="model", metrics=[METRIC], details={"k_effective": {20: 20}}),
    baselines=[ModelScores(name="raw pixels", metrics=[METRIC.model_copy(update={"value": 0.25})])],
    cost={"seconds": 1.5},
    environment={"device": "cpu"},
    warnings=["look out"],
)


def test_topk_metrics_count_ranks():
    ranks = torch.tensor([0, 0, 1, 4, 5, 9])
    top1, top5 = topk_metrics(ranks, 10, ", k=3")
    assert (top1.name, top1.value, top1.n) == ("top-1, k=3", pytest.approx(2 / 6), 6)
    assert (top5.name, top5.value) == ("top-5, k=3", pytest.approx(4 / 6))
    assert (top1.low, top1.high) == wilson(2, 6)


@pytest.mark.parametrize(("classes", "metrics"), [(2, 1), (5, 1), (6, 2)])
def test_topk_metrics_need_six_classes_for_top_5(classes, metrics):
    assert len(topk_metrics(torch.tensor([0, 1]), classes)) == metrics


def test_protocol_hash_differs_for_any_value_but_not_the_order():
    protocol = {"k": [10, 20], "temperature": 0.07, "transform": {"image_size": 32}}
    same = {"transform": {"image_size": 32}, "temperature": 0.07, "k": [10, 20]}
    one = changed(RESULT, protocol=protocol)
    assert one.protocol_hash == changed(RESULT, protocol=same).protocol_hash
    others = [changed(one, task="linear")]
    others += [
        changed(one, protocol={**protocol, **change}) for change in ({"k": [20]}, {"temperature": 0.1}, {"x": 1})
    ]
    assert len({result.protocol_hash for result in (one, *others)}) == 5


def test_write_can_be_read_again_and_leaves_no_partial_file(tmp_path):
    path = tmp_path / "eval" / "knn-photos.json"
    RESULT.write(path)
    RESULT.write(path)
    content = json.loads(path.read_text())
    assert content["schema"] == 3
    assert content["package"]["name"] == "ssl-vit"
    assert content["protocol_hash"] == RESULT.protocol_hash
    assert content["score"]["metrics"][0] == {
        "name": "top-1, k=20",
        "value": 0.5,
        "n": 100,
        "low": 0.404,
        "high": 0.596,
        "interval": "Wilson",
        "title": "",
        "note": "",
        "level": "score",
    }
    again = read_result(path)
    assert (again.score.metrics, again.data, again.model) == (RESULT.score.metrics, RESULT.data, RESULT.model)
    assert again.path == path
    assert content["predictions_file"] is None
    assert sorted(file.name for file in path.parent.iterdir()) == [".results.lock", "history.jsonl", "knn-photos.json"]


def test_eval_result_created_is_finer_than_a_second(tmp_path):
    before = datetime.now(UTC)
    changed(RESULT).write(tmp_path / "a.json")
    created = datetime.fromisoformat(json.loads((tmp_path / "a.json").read_text())["created"])
    assert before <= created <= datetime.now(UTC)


def test_table_shows_scores_beside_baselines():
    lines = RESULT.table().splitlines()
    assert lines[0] == "knn on photos: 100 test images, 4 classes, 1,000 training images (train and test)"
    assert lines[1].startswith("model: ")
    assert lines[3].split() == ["accuracy", "in", "%", "model", "raw", "pixels"]
    assert lines[4].split() == ["top-1,", "k=20", "50.0", "±", "9.6", "25.0"]
    assert lines[-1] == "warning: look out"


PREDICTIONS = Predictions(*(torch.tensor(part) for part in ([0, 2, 300], [1, 0, 1], [1, 1, 1], [0, 1, 0])))


def with_predictions(**changes):
    return changed(
        RESULT, score=ModelScores(name="model", metrics=[METRIC], predictions={", k=20": PREDICTIONS}), **changes
    )


def test_write_stores_predictions_beside_the_json(tmp_path):
    path = tmp_path / "knn-photos.json"
    with_predictions().write(path)
    content = json.loads(path.read_text())
    assert "predictions" not in content["score"]
    with np.load(tmp_path / content["predictions_file"]) as arrays:
        assert str(arrays["id"]) == content["id"]
        for part, values in PREDICTIONS._asdict().items():
            saved = arrays[f"model, k=20/{part}"]
            assert saved.tolist() == values.tolist()
            assert saved.dtype == (np.uint16 if part == "indices" else np.uint8)


def test_eval_result_history_keeps_every_result(tmp_path):
    path = tmp_path / "knn-photos.json"
    RESULT.write(path)
    changed(RESULT, protocol={"k": [1], "split": "train and test"}).write(path)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"cut off')
    changed(RESULT, task="linear").write(tmp_path / "linear-photos.json")
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert lines[2] == '{"cut off'
    first, second, third = (json.loads(line) for line in (lines[0], lines[1], lines[3]))
    assert [first["protocol"]["k"], second["protocol"]["k"], third["task"]] == [[20], [1], "linear"]
    assert second == json.loads(path.read_text())
    assert len({first["id"], second["id"], third["id"]}) == 3


def test_write_is_strict_json_for_odd_values(tmp_path):
    odd = {"nan": float("nan"), "inf": [float("inf"), 1.0], "3": {"x": -float("inf")}, "city": "caf\udce9"}
    changed(RESULT, data=DataInfo(**RESULT.data.model_dump(), **odd)).write(tmp_path / "knn.json")

    def refuse(constant):
        raise AssertionError(constant)

    for text in (tmp_path / "knn.json").read_text(), (tmp_path / "history.jsonl").read_text():
        data = json.loads(text, parse_constant=refuse)["data"]
        assert (data["nan"], data["inf"], data["3"]) == (None, [None, 1.0], {"x": None})


def test_package_info_names_the_version_and_commit():
    package = provenance.package_info()
    assert package["name"] == "ssl-vit"
    if package["git"] is not None:  # a checkout
        assert len(package["git"]) == 40
        assert isinstance(package["dirty"], bool)


@pytest.mark.parametrize(
    ("text", "seed"), [("seed: 7\n", 7), ("a: 1\n", None), ("[", None), ("- 1\n", None), ("seed: x\n", None)]
)
def test_pretraining_seed_is_none_where_unknown(text, seed, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert provenance.pretraining_seed(tmp_path) == seed


@pytest.mark.parametrize(
    ("overrides", "name"),
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
def test_data_name(overrides, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_name(load_config("knn", ["checkpoint=x", *overrides], KNNConfig).data) == name


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a run directory, beside which the same model lies as a file."""
    sizes = {"img_size": 32, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 32, "depth": 1}
    backbone = Backbone(BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes))
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    half = [0.5, 0.5, 0.5]
    export_backbone(backbone, folder / "backbone.safetensors", mean=half, std=half, source="a test")
    (folder / "config.yaml").write_text("seed: 3\n")
    export_backbone(backbone, folder.parent / "my net.safetensors", mean=half, std=half, source="a test")
    return folder


def test_result_path_contains_the_model_without_a_run(exported):
    def name(checkpoint, *overrides):
        config = load_config("knn", [f"checkpoint={checkpoint}", "data.root=lab", *overrides], KNNConfig)
        return result_path("knn", config, load_backbone(checkpoint, config.weights))

    file = exported.parent / "my net.safetensors"
    digest = load_backbone(str(file)).sha256[:8]
    assert name(str(exported)) == exported / "eval" / "knn-lab.json"
    with pytest.raises(UserError, match="it does not tell of student weights"):
        name(str(exported), "weights=student")
    assert str(name(str(file))) == f"knn-lab-my-net-{digest}.json"
    assert str(name("random:vit_tiny_patch16_224")) == "knn-lab-random-vit_tiny_patch16_224.json"
    assert str(name(f"random:{exported}")) == "knn-lab-random-tiny.json"


def test_model_metadata_identifies_the_model(exported):
    loaded = load_backbone(str(exported))
    metadata = provenance.model_metadata(loaded, str(exported), "teacher")
    assert metadata["name"] == "tiny"
    assert metadata["run"] == str(exported)
    assert metadata["params"] == sum(parameter.numel() for parameter in loaded.backbone.parameters())
    assert metadata["state_sha256"] == loaded.backbone.state_sha256()
    assert (metadata["backbone"]["patch_size"], metadata["backbone"]["img_size"]) == (16, 32)


def test_model_name_of_a_timm_model_is_its_name():
    loaded = LoadedBackbone(None, [], [], "timm:vit_small_patch16_224.dino", None, None)
    name = model_name(loaded, "timm:vit_small_patch16_224.dino", "teacher")
    assert name == "vit_small_patch16_224.dino"
    assert sibling_path(Path(f"knn-{name}.json"), ".npz").name == f"knn-{name}.npz"


def test_results_written_at_once_stay_whole(tmp_path):
    path = tmp_path / "knn.json"
    arrays = torch.arange(20000)
    score = ModelScores(name="model", metrics=[METRIC], predictions={", k=20": Predictions(*[arrays] * 4)})
    results = [changed(RESULT, id=f"{number:032}", score=score) for number in range(12)]
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda result: result.write(path), results))
    written = json.loads(path.read_bytes())
    assert str(np.load(tmp_path / "knn.npz")["id"]) == written["id"]
    lines = [json.loads(line)["id"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted(result.id for result in results)
    assert lines[-1] == written["id"]


def test_lock_result_says_that_it_waits(tmp_path, caplog):
    held = FileLock(tmp_path / ".results.lock")
    held.acquire()
    threading.Timer(0.2, held.release, kwargs={"force": True}).start()
    held = threading.Thread(target=RESULT.write, args=[tmp_path / "knn.json"])
    held.start()
    held.join()
    assert "another command is writing results into this folder" in caplog.text


def test_model_name_of_a_run_has_no_control_characters(tmp_path):
    run = tmp_path / "a\x1b[31m\n<b>"
    loaded = LoadedBackbone(None, [0.5], [0.5], "x", None, run)
    assert model_name(loaded, str(run), "teacher") == "a\\x1b[31m\\n<b>"
