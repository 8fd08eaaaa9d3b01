"""`ssl-vit knn` and `ssl-vit linear`, from checkpoint and images to result and table."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
import yaml
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.commands import linear
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import LinearConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.export import export_backbone


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 32, "depth": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes)
    return Backbone(config)


@pytest.fixture
def run(model, tmp_path):
    """Return a run directory with an exported model."""
    return export(model, tmp_path / "runs" / "tiny")


def export(model, folder):
    half = [0.5, 0.5, 0.5]
    export_backbone(model, folder / "backbone.safetensors", mean=half, std=half, source="a test")
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def evaluate(command, *overrides):
    assert main([command, "data.num_workers=0", "figure=false", *overrides]) == 0


def failed(capsys, *overrides):
    """Return the error message of `knn` with invalid overrides."""
    assert main(["knn", "data.num_workers=0", *map(str, overrides)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(("command", "overrides"), [("knn", []), ("linear", ["l2=[1e-1,1e-3]"])])
def test_evaluations_write_result_and_table(command, overrides, run, sample, capsys):
    evaluate(command, f"checkpoint={run}", f"data.root={sample}", "figure=true", *overrides)
    path = run / "eval" / f"{command}-{sample.name}.json"
    result = json.loads(path.read_text())
    assert result["task"] == command
    assert result["model"]["source"] == str(run / "backbone.safetensors")
    assert len(result["model"]["sha256"]) == 64
    assert result["model"]["backbone"]["embed_dim"] == 32
    data = result["data"]
    assert (data["n_train"], data["n_test"], data["n_classes"], data["skipped"]) == (192, 48, 12, 0)
    assert result["protocol"]["split"] == "train and test"
    assert result["protocol"]["transform"]["image_size"] == 48
    assert [score["name"] for score in result["baselines"]] == ["random init", "raw pixels"]
    for score in [result["score"], *result["baselines"]]:
        for metric in score["metrics"]:
            assert metric["n"] == 48
            assert metric["low"] <= metric["value"] <= metric["high"]
            assert 0.0 <= metric["value"] <= 0.6 or metric["name"].startswith("top-5")  # nothing was trained
    engines = {"knn"} if command == "knn" else set()
    assert set(result["environment"]) == {"python", "torch", "timm", "faiss", "device", "forward", "threads"} | engines
    assert data["root"] == str(sample)
    assert result["seeds"] == {"pretrain": 0, "evaluation": 0}
    assert result["cost"]["peak_memory_bytes"]["host"] > 1e7
    by_class = result["by_class"]
    assert [row["name"] for row in by_class["classes"]] == sorted(path.name for path in (sample / "test").iterdir())
    right = sum(row["n"] * row["value"] for row in by_class["classes"])
    metric_of_classes = next(metric for metric in result["score"]["metrics"] if metric["name"] == by_class["metric"])
    assert right == pytest.approx(metric_of_classes["n"] * metric_of_classes["value"])
    with np.load(path.with_name(result["predictions_file"])) as predictions:
        suffix = metric_of_classes["name"].removeprefix("top-1")
        for score in ("model", "random init", "raw pixels"):
            assert predictions[f"{score}{suffix}/target"].tolist() == predictions[f"model{suffix}/target"].tolist()
        ranks, predicted, target = (predictions[f"model{suffix}/{part}"] for part in ("rank", "predicted", "target"))
        assert ((ranks == 0) == (predicted == target)).all()
        assert (ranks == 0).mean() == pytest.approx(metric_of_classes["value"])
    printed = capsys.readouterr().out
    assert "raw pixels" in printed
    assert str(path) in printed
    assert str(path.with_suffix(".png")) in printed
    with Image.open(path.with_name(by_class["figure"])) as figure:
        assert min(figure.size) > 400


def test_linear_result_names_the_selection(run, sample):
    evaluate("linear", f"checkpoint={run}", f"data.root={sample}", "baselines=false", "l2=[1e-1,1e-3]")
    result = json.loads((run / "eval" / f"linear-{sample.name}.json").read_text())
    chosen = result["score"]["details"]["chosen"]
    assert result["selection"] == {"on": result["protocol"]["selection"], "fraction": 0.1, "seed": 0, "chosen": chosen}
    assert result["selection"]["on"].startswith("0.1 of the training images of each class")


@pytest.mark.parametrize(("command", "overrides"), [("knn", []), ("linear", ["l2=[1e-1,1e-3]"])])
def test_evaluations_are_reproducible(command, overrides, run, sample, tmp_path):
    results, predictions = [], []
    for name in ("a", "b"):
        out = tmp_path / name / "result.json"
        evaluate(command, f"checkpoint={run}", f"data.root={sample}", f"out={out}", *overrides)
        result = json.loads(out.read_text())
        results.append({key: value for key, value in result.items() if key not in ("created", "cost", "id")})
        with np.load(out.with_suffix(".npz")) as arrays:
            predictions.append({name: arrays[name].tolist() for name in arrays.files if name != "id"})
    assert results[0] == results[1]
    assert predictions[0] == predictions[1]


def test_knn_engines_give_the_same_scores(run, sample, tmp_path):
    results = {}
    for engine in ("torch", "faiss", "auto"):
        out = tmp_path / f"{engine}.json"
        evaluate("knn", f"checkpoint={run}", f"data.root={sample}", f"out={out}", f"engine={engine}")
        results[engine] = json.loads(out.read_text())
    for result in results.values():
        assert result["score"] == results["torch"]["score"]
        assert result["protocol_hash"] == results["torch"]["protocol_hash"]  # so they are comparable
    used = {engine: result["environment"]["knn"] for engine, result in results.items()}
    assert (used["torch"], used["faiss"]) == ("torch", "faiss")
    assert used["auto"] in ("torch", "faiss")


def test_knn_of_one_folder_is_leave_one_out(run, sample):
    evaluate("knn", f"checkpoint={run}", f"data.root={sample / 'train'}", "baselines=false")
    result = json.loads((run / "eval" / f"knn-{sample.name}-train.json").read_text())
    assert result["protocol"]["split"] == "leave-one-out"
    assert (result["data"]["n_train"], result["data"]["n_test"]) == (192, 192)
    assert result["baselines"] == []


def test_linear_splits_a_single_folder(run, sample):
    evaluate("linear", f"checkpoint={run}", f"data.root={sample / 'train'}", "baselines=false", "blocks=[1,99]")
    result = json.loads((run / "eval" / f"linear-{sample.name}-train.json").read_text())
    assert result["protocol"]["split"] == "0.2 of each class held out as test images, seed 0"
    assert (result["data"]["n_train"], result["data"]["n_test"]) == (156, 36)
    features = {candidate["features"] for candidate in result["score"]["details"]["candidates"]}
    assert features == {  # 99 blocks are clamped to 2
        "[CLS] of the last block",
        "[CLS] of the last block + patch mean",
        "[CLS] of the last 2 blocks",
        "[CLS] of the last 2 blocks + patch mean",
    }
    assert result["score"]["details"]["chosen"]["features"] in features


def test_knn_of_two_folders_writes_to_the_current_folder(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [
        f"data.train={sample / 'train'}",
        f"data.test={sample / 'test'}",
        "data.image_size=32",
        "baselines=false",
    ]
    evaluate("knn", "checkpoint=random:vit_tiny_patch16_224", *overrides)
    result = json.loads((tmp_path / f"knn-{sample.name}-random-vit_tiny_patch16_224.json").read_text())
    assert result["model"]["sha256"] is None
    assert result["data"]["root"] == str(sample / "train")
    assert result["data"]["test"] == str(sample / "test")


def test_knn_counts_and_lists_unreadable_images(run, sample, tmp_path, capsys):
    shutil.copytree(sample, tmp_path / "mixed")
    for part in ("train", "test"):
        (tmp_path / "mixed" / part / "red-dots" / "0000.png").write_bytes(b"no image")
    for _ in range(2):  # a second evaluation counts them again
        evaluate("knn", f"checkpoint={run}", f"data.root={tmp_path / 'mixed'}")
    result = json.loads((run / "eval" / "knn-mixed.json").read_text())
    assert result["data"]["skipped"] == 2
    assert (result["data"]["n_train"], result["data"]["n_test"]) == (191, 47)
    assert "red-dots/0000.png" in (run / "eval" / "knn-mixed-skipped-test.txt").read_text()
    assert "1 image could not be read" in capsys.readouterr().out


def test_knn_counts_duplicates_between_train_and_test_images(run, sample, tmp_path, capsys):
    shutil.copytree(sample / "train", tmp_path / "leak" / "train")
    shutil.copytree(sample / "test", tmp_path / "leak" / "test")
    for number in range(3):
        name = f"blue-dots/{number:04d}.png"
        shutil.copy(tmp_path / "leak" / "train" / name, tmp_path / "leak" / "test" / name)
    evaluate("knn", f"checkpoint={run}", f"data.root={tmp_path / 'leak'}", "baselines=false")
    assert json.loads((run / "eval" / "knn-leak.json").read_text())["data"]["near_duplicates"] == 3
    assert "3 test images nearly equal to a training image" in capsys.readouterr().out


def test_knn_clamps_k_and_warns(run, sample, capsys):
    evaluate("knn", f"checkpoint={run}", f"data.root={sample}", "baselines=false", "k=[10,5000]")
    assert "k = 5000: there are only 192 neighbors" in capsys.readouterr().out
    result = json.loads((run / "eval" / f"knn-{sample.name}.json").read_text())
    assert result["score"]["details"]["k_effective"] == {"10": 10, "5000": 192}


def test_knn_rejects_collapsed_and_diverged_models(model, sample, tmp_path, capsys):
    state = {key: value.clone() for key, value in model.vit.state_dict().items()}
    flat, wild = Backbone(model.config), Backbone(model.config)
    flat.vit.load_state_dict({**state, "patch_embed.proj.weight": 0 * state["patch_embed.proj.weight"]})
    wild.vit.load_state_dict({**state, "norm.weight": state["norm.weight"] * torch.nan})
    runs = [export(broken, tmp_path / name) for name, broken in (("flat", flat), ("wild", wild))]
    assert "collapsed" in failed(capsys, f"checkpoint={runs[0]}", f"data.root={sample}")
    assert "not finite" in failed(capsys, f"checkpoint={runs[1]}", f"data.root={sample}")


def test_knn_reports_user_errors(run, sample, tmp_path, capsys):
    model, dataset = f"checkpoint={run}", f"data.root={sample}"
    one_class = sample / "train" / "red-dots"
    (tmp_path / "empty").mkdir()
    assert "labels are the names" in failed(capsys, model, f"data.root={one_class}")
    shutil.copytree(one_class, tmp_path / "one" / "red-dots")
    assert "all images lie in red-dots" in failed(capsys, model, f"data.root={tmp_path / 'one'}")
    assert "empty" in failed(capsys, model, f"data.root={tmp_path / 'empty'}")
    assert "does not exist" in failed(capsys, model, f"data.root={tmp_path / 'nowhere'}")
    assert "data.image_size=48" in failed(capsys, model, dataset, "data.image_size=50")
    assert "no such file" in failed(capsys, "checkpoint=runs/nowhere", dataset)
    assert "checkpoint" in failed(capsys, dataset)
    assert "data.root" in failed(capsys, model)
    assert "k.0" in failed(capsys, model, dataset, "k=[0]")


def test_knn_rejects_a_single_readable_class(run, sample, tmp_path, capsys):
    shutil.copytree(sample / "train" / "red-dots", tmp_path / "two" / "good")
    (tmp_path / "two" / "bad").mkdir()
    (tmp_path / "two" / "bad" / "x.png").write_bytes(b"no image")
    assert "all readable images are of one class" in failed(
        capsys, f"checkpoint={run}", f"data.root={tmp_path / 'two'}"
    )


def test_knn_rejects_a_folder_as_output_before_it_starts(run, sample, tmp_path, capsys):
    for name in ("result.json", "result.npz", "result.png"):
        (tmp_path / name / "x").mkdir(parents=True)
        error = failed(capsys, f"checkpoint={run}", f"data.root={sample}", f"out={tmp_path / 'result.json'}")
        assert str(tmp_path / name) in error
        shutil.rmtree(tmp_path / name)


def test_knn_logs_metrics_and_figure_to_the_wandb_run_of_the_pretraining(run, sample):
    (run / "wandb_id.txt").write_text("abcd1234")
    offline = ["logger=wandb", "logger.offline=true", "figure=true", "k=[20]", "baselines=false"]
    evaluate("knn", f"checkpoint={run}", f"data.root={sample}", *offline)
    wandb.teardown()  # its process writes the file to its end
    (folder,) = (run / "wandb").glob("offline-run-*-abcd1234")
    content = (folder / "run-abcd1234.wandb").read_bytes()
    value = json.loads((run / "eval" / f"knn-{sample.name}.json").read_text())["score"]["metrics"][0]["value"]
    assert f"eval/knn-{sample.name}/top-1, k=20".encode() in content
    assert str(value)[:8].encode() in content
    assert list(folder.rglob("*.png"))


def test_knn_starts_a_wandb_run_without_pretraining(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["logger=wandb", "logger.offline=true", "k=[20]", "baselines=false", "data.image_size=32"]
    evaluate("knn", "checkpoint=random:vit_tiny_patch16_224", f"data.root={sample}", *overrides)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_knn_keeps_the_result_if_wandb_fails(run, sample, capsys, monkeypatch):
    def refuse(**settings):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    overrides = ["logger=wandb", "k=[20]", "baselines=false", "figure=false"]
    error = failed(capsys, f"checkpoint={run}", f"data.root={sample}", *overrides)
    assert "no API key" in error
    assert "logger.offline=true" in error
    assert (run / "eval" / f"knn-{sample.name}.json").is_file()


SOLVERS = {
    "logistic": ["l2=[1e-1,1e-3]"],
    "ridge": ["solver=ridge", "l2=[1e-1,1e-3]"],
    "sgd": ["solver=sgd", "sgd.lr=[0.01,0.1]", "sgd.epochs=3", "sgd.batch_size=64"],
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_linear_evaluates_baselines_with_every_solver(solver, run, sample, tmp_path):
    out = tmp_path / "out.json"
    evaluate("linear", f"checkpoint={run}", f"data.root={sample}", f"out={out}", *SOLVERS[solver])
    result = json.loads(out.read_text())
    assert result["task"] == ("linear" if solver == "logistic" else f"linear-{solver}")  # separate results
    assert result["protocol"]["solver"].lower().startswith(solver)
    assert ("leave-one-out" in result["protocol"]["selection"]) == (solver == "ridge")
    for score in [result["score"], *result["baselines"]]:
        variants = 1 if score["name"] == "raw pixels" else 4
        candidates = score["details"]["candidates"]
        assert len(candidates) == 2 * variants
        assert score["details"]["chosen"] in candidates
        assert {"features", "accuracy", "loss"} < candidates[0].keys()


@pytest.mark.parametrize("solver", SOLVERS)
def test_linear_saves_a_probe_that_reproduces_the_predictions(solver, run, sample, tmp_path, monkeypatch):
    """Execute the lines in its JSON."""
    out = tmp_path / "out.json"
    monkeypatch.chdir(tmp_path)
    overrides = [f"checkpoint={run}", f"data.root={sample}", f"out={out}", "data.num_workers=0", "baselines=false"]
    result, _ = linear.evaluate(load_config("linear", [*overrides, *SOLVERS[solver]], LinearConfig))
    description = json.loads((tmp_path / "out.probe.json").read_text())
    predictions = result.score.predictions[""]
    transform = EvalTransform(*(description["transform"][name] for name in ("image_size", "crop_ratio", "mean", "std")))
    dataset = scan_image_folder(sample / "test")
    images = transform.normalize(torch.stack([transform(dataset.read(int(index), 3)) for index in predictions.indices]))
    names = {"images": images}
    exec("\n".join(description["apply"]), names)
    predicted = [description["classes"][label] for label in names["scores"].argmax(dim=1)]
    assert predicted == [dataset.classes[label] for label in predictions.predicted]
    assert names["probe"].keys() == {"mean", "scale", "weight", "bias"}
    assert description["checkpoint"]["sha256"] == result.model.sha256


def test_knn_archives_a_result_of_other_settings(run, sample, caplog):
    overrides = [f"checkpoint={run}", f"data.root={sample}", "baselines=false"]
    result = run / "eval" / f"knn-{sample.name}.json"
    evaluate("knn", *overrides, "k=5")
    first = json.loads(result.read_text())
    evaluate("knn", *overrides, "k=[5]", "figure=true")  # the same
    assert not (run / "eval" / "replaced").exists()
    again = json.loads(result.read_text())
    assert first["score"] == again["score"]
    evaluate("knn", *overrides, "k=7")
    assert "contained a result of other settings" in caplog.text
    kept = sorted(file.name for file in (run / "eval" / "replaced").iterdir())
    stem = f"knn-{sample.name}-{again['id'][:8]}"
    assert kept == [f"{stem}.json", f"{stem}.npz", f"{stem}.png"]
    assert json.loads((run / "eval" / "replaced" / f"{stem}.json").read_text()) == again
    assert json.loads(result.read_text())["protocol"]["k"] == [7]
    evaluate("knn", *overrides, "k=7", "figure=true")
    evaluate("knn", *overrides, "k=7")
    assert not result.with_suffix(".png").exists()  # the figure of the other evaluation is deleted


def test_knn_warns_of_classes_without_test_images(run, sample, tmp_path):
    shutil.copytree(sample, tmp_path / "few")
    for file in (tmp_path / "few" / "test" / "red-dots").iterdir():
        file.write_bytes(b"no image")
    evaluate("knn", f"checkpoint={run}", f"data.root={tmp_path / 'few'}", "baselines=false", "k=5")
    warnings = json.loads((run / "eval" / "knn-few.json").read_text())["warnings"]
    assert "1 of 12 classes have no test images and are not evaluated" in warnings


def test_knn_prints_and_stores_what_was_evaluated(tiny_model, sample, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert (
        main(["knn", f"checkpoint={tiny_model}", f"data.root={sample}", f"out={out}", "baselines=false", "k=[1]"]) == 0
    )
    printed, data = capsys.readouterr().out, json.loads(out.read_text())["data"]
    for part in ("train", "test"):
        assert f"{part}: {data[f'{part}_images']}" in printed
        assert str(sample / part) in data[f"{part}_images"]
    assert "model: " in printed
    assert f"classes: {', '.join(data['classes'])}" in printed


def test_knn_warns_if_the_run_has_trained_on_the_test_images(tiny_model, sample, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(Path(tiny_model).parent, run)
    words = [f"checkpoint={run}", f"data.root={sample}", "baselines=false", "k=[1]"]
    for root, warned in ((sample, True), (sample / "test", True), (sample / "train", False)):
        (run / "config.yaml").write_text(yaml.safe_dump({"data": {"root": str(root)}}))
        assert main(["knn", *words]) == 0
        assert ("these test images included" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("command", ["knn", "linear", "fewshot", "finetune"])
@pytest.mark.parametrize("place", ["same", "link", "inside"])
def test_evaluations_refuse_test_images_that_are_training_images(command, place, sample, tiny_model, tmp_path, capsys):
    folder = sample / "test"
    (tmp_path / "link").symlink_to(folder)
    other = {"same": folder, "link": tmp_path / "link", "inside": next(folder.iterdir())}[place]
    assert main([command, f"checkpoint={tiny_model}", f"data.train={folder}", f"data.test={other}"]) == 2
    assert "test images would be training images" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["linear", "fewshot"])
def test_evaluations_warn_of_test_images_that_equal_training_images(command, sample, tiny_model, tmp_path):
    shutil.copytree(sample / "test", tmp_path / "copy")
    words = [f"data.train={sample / 'train'}", f"data.test={tmp_path / 'copy'}", "baselines=false"]
    assert main([command, f"checkpoint={tiny_model}", *words, f"out={tmp_path / 'clean.json'}"]) == 0
    image = next((sample / "train").rglob("*.png"))
    shutil.copy(image, tmp_path / "copy" / image.parent.name / "leaked.png")
    assert main([command, f"checkpoint={tiny_model}", *words, f"out={tmp_path / 'leaked.json'}"]) == 0
    clean, leaked = (json.loads((tmp_path / f"{name}.json").read_text())["warnings"] for name in ("clean", "leaked"))
    assert not any("byte for byte" in text for text in clean)
    assert any("1 test image nearly equal" in text and "1 of them byte for byte" in text for text in leaked)
