"""`ssl-vit knn` and `ssl-vit linear`, from checkpoint and images to record and table."""

import json
import shutil

import numpy as np
import pytest
import torch
import wandb
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.commands import linear
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import LinearConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import export_backbone


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 32, "depth": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes)
    return Backbone(config)


@pytest.fixture
def run(network, tmp_path):
    """A run folder with an exported model."""
    return export(network, tmp_path / "runs" / "tiny")


def export(network, folder):
    half = [0.5, 0.5, 0.5]
    export_backbone(network, folder / "backbone.safetensors", mean=half, std=half, source="a test")
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def measured(command, *words):
    assert main([command, "data.num_workers=0", "figure=false", *words]) == 0


def failed(capsys, *words):
    """The message of a command that the user got wrong."""
    assert main(["knn", "data.num_workers=0", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(("command", "words"), [("knn", []), ("linear", ["l2=[1e-1,1e-3]"])])
def test_record_and_table_of_a_run(command, words, run, sample, capsys):
    measured(command, f"checkpoint={run}", f"data.root={sample}", "figure=true", *words)
    path = run / "eval" / f"{command}-{sample.name}.json"
    record = json.loads(path.read_text())
    assert record["task"] == command
    assert record["model"]["source"] == str(run / "backbone.safetensors")
    assert len(record["model"]["sha256"]) == 64
    assert record["model"]["backbone"]["embed_dim"] == 32
    data = record["data"]
    assert (data["n_train"], data["n_test"], data["n_classes"], data["skipped"]) == (192, 48, 12, 0)
    assert record["protocol"]["split"] == "train and test"
    assert record["protocol"]["transform"]["image_size"] == 48
    assert [score["name"] for score in record["baselines"]] == ["random init", "raw pixels"]
    for score in [record["score"], *record["baselines"]]:
        for metric in score["metrics"]:
            assert metric["n"] == 48
            assert metric["low"] <= metric["value"] <= metric["high"]
            assert 0.0 <= metric["value"] <= 0.6 or metric["name"].startswith("top-5")  # nothing was trained
    engines = {"knn"} if command == "knn" else set()
    assert set(record["environment"]) == {"python", "torch", "timm", "faiss", "device", "forward", "threads"} | engines
    assert data["root"] == str(sample)
    assert record["seeds"] == {"pretrain": 0, "evaluation": 0}
    assert record["cost"]["peak_memory_bytes"]["host"] > 1e7
    by_class = record["by_class"]
    assert [row["name"] for row in by_class["classes"]] == sorted(path.name for path in (sample / "test").iterdir())
    right = sum(row["n"] * row["value"] for row in by_class["classes"])
    told = next(metric for metric in record["score"]["metrics"] if metric["name"] == by_class["metric"])
    assert right == pytest.approx(told["n"] * told["value"])
    with np.load(path.with_name(record["predictions_file"])) as answers:
        suffix = told["name"].removeprefix("top-1")
        for score in ("model", "random init", "raw pixels"):
            assert answers[f"{score}{suffix}/target"].tolist() == answers[f"model{suffix}/target"].tolist()
        ranks, predicted, truth = (answers[f"model{suffix}/{part}"] for part in ("rank", "predicted", "target"))
        assert ((ranks == 0) == (predicted == truth)).all()
        assert (ranks == 0).mean() == pytest.approx(told["value"])
    printed = capsys.readouterr().out
    assert "raw pixels" in printed
    assert str(path) in printed
    assert str(path.with_suffix(".png")) in printed
    with Image.open(path.with_name(by_class["figure"])) as sheet:
        assert min(sheet.size) > 400


def test_a_probe_says_what_was_chosen_and_by_which_images(run, sample):
    measured("linear", f"checkpoint={run}", f"data.root={sample}", "baselines=false", "l2=[1e-1,1e-3]")
    record = json.loads((run / "eval" / f"linear-{sample.name}.json").read_text())
    chosen = record["score"]["details"]["chosen"]
    assert record["selection"] == {"on": record["protocol"]["selection"], "fraction": 0.1, "seed": 0, "chosen": chosen}
    assert record["selection"]["on"].startswith("0.1 of the training images of each class")


@pytest.mark.parametrize(("command", "words"), [("knn", []), ("linear", ["l2=[1e-1,1e-3]"])])
def test_the_same_seed_gives_the_same_record(command, words, run, sample, tmp_path):
    records, answers = [], []
    for name in ("a", "b"):
        out = tmp_path / name / "record.json"
        measured(command, f"checkpoint={run}", f"data.root={sample}", f"out={out}", *words)
        record = json.loads(out.read_text())
        records.append({key: value for key, value in record.items() if key not in ("created", "cost", "id")})
        with np.load(out.with_suffix(".npz")) as arrays:
            answers.append({name: arrays[name].tolist() for name in arrays.files if name != "id"})
    assert records[0] == records[1]
    assert answers[0] == answers[1]


def test_engines_give_the_same_scores(run, sample, tmp_path):
    records = {}
    for engine in ("torch", "faiss", "auto"):
        out = tmp_path / f"{engine}.json"
        measured("knn", f"checkpoint={run}", f"data.root={sample}", f"out={out}", f"engine={engine}")
        records[engine] = json.loads(out.read_text())
    for record in records.values():
        assert record["score"] == records["torch"]["score"]
        assert record["protocol_hash"] == records["torch"]["protocol_hash"]  # they may be compared
    used = {engine: record["environment"]["knn"] for engine, record in records.items()}
    assert (used["torch"], used["faiss"]) == ("torch", "faiss")
    assert used["auto"] in ("torch", "faiss")


def test_one_folder_is_left_one_out(run, sample):
    measured("knn", f"checkpoint={run}", f"data.root={sample / 'train'}", "baselines=false")
    record = json.loads((run / "eval" / f"knn-{sample.name}-train.json").read_text())
    assert record["protocol"]["split"] == "leave-one-out"
    assert (record["data"]["n_train"], record["data"]["n_test"]) == (192, 192)
    assert record["baselines"] == []


def test_one_folder_is_split_for_the_probe(run, sample):
    measured("linear", f"checkpoint={run}", f"data.root={sample / 'train'}", "baselines=false", "blocks=[1,99]")
    record = json.loads((run / "eval" / f"linear-{sample.name}-train.json").read_text())
    assert record["protocol"]["split"] == "0.2 of each class held out to test, seed 0"
    assert (record["data"]["n_train"], record["data"]["n_test"]) == (156, 36)
    features = {trial["features"] for trial in record["score"]["details"]["trials"]}
    assert features == {  # 99 blocks are all that there are
        "[CLS] of the last block",
        "[CLS] of the last block + patch mean",
        "[CLS] of the last 2 blocks",
        "[CLS] of the last 2 blocks + patch mean",
    }
    assert record["score"]["details"]["chosen"]["features"] in features


def test_two_folders_and_a_record_in_the_current_folder(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"data.train={sample / 'train'}", f"data.test={sample / 'test'}", "data.image_size=32", "baselines=false"]
    measured("knn", "checkpoint=random:vit_tiny_patch16_224", *words)
    record = json.loads((tmp_path / f"knn-{sample.name}-random-vit_tiny_patch16_224.json").read_text())
    assert record["model"]["sha256"] is None
    assert record["data"]["root"] == str(sample / "train")
    assert record["data"]["test"] == str(sample / "test")


def test_broken_images_are_counted_and_named(run, sample, tmp_path, capsys):
    shutil.copytree(sample, tmp_path / "mixed")
    for part in ("train", "test"):
        (tmp_path / "mixed" / part / "red-dots" / "0000.png").write_bytes(b"no image")
    for _ in range(2):  # a second evaluation counts anew
        measured("knn", f"checkpoint={run}", f"data.root={tmp_path / 'mixed'}")
    record = json.loads((run / "eval" / "knn-mixed.json").read_text())
    assert record["data"]["skipped"] == 2
    assert (record["data"]["n_train"], record["data"]["n_test"]) == (191, 47)
    assert "red-dots/0000.png" in (run / "eval" / "knn-mixed-skipped-test.txt").read_text()
    assert "1 images could not be read" in capsys.readouterr().out


def test_copies_between_training_and_test_images_are_counted(run, sample, tmp_path, capsys):
    shutil.copytree(sample / "train", tmp_path / "leak" / "train")
    shutil.copytree(sample / "test", tmp_path / "leak" / "test")
    for number in range(3):
        name = f"blue-dots/{number:04d}.png"
        shutil.copy(tmp_path / "leak" / "train" / name, tmp_path / "leak" / "test" / name)
    measured("knn", f"checkpoint={run}", f"data.root={tmp_path / 'leak'}", "baselines=false")
    assert json.loads((run / "eval" / "knn-leak.json").read_text())["data"]["near_duplicates"] == 3
    assert "3 test images are nearly the same as a training image" in capsys.readouterr().out


def test_k_beyond_the_data_is_clamped_and_said(run, sample, capsys):
    measured("knn", f"checkpoint={run}", f"data.root={sample}", "baselines=false", "k=[10,5000]")
    assert "k = 5000: there are only 192 neighbors" in capsys.readouterr().out
    record = json.loads((run / "eval" / f"knn-{sample.name}.json").read_text())
    assert record["score"]["details"]["k_effective"] == {"10": 10, "5000": 192}


def test_collapsed_and_diverged_models_are_refused(network, sample, tmp_path, capsys):
    state = {key: value.clone() for key, value in network.vit.state_dict().items()}
    flat, wild = Backbone(network.config), Backbone(network.config)
    flat.vit.load_state_dict({**state, "patch_embed.proj.weight": 0 * state["patch_embed.proj.weight"]})
    wild.vit.load_state_dict({**state, "norm.weight": state["norm.weight"] * torch.nan})
    runs = [export(broken, tmp_path / name) for name, broken in (("flat", flat), ("wild", wild))]
    assert "collapsed" in failed(capsys, f"checkpoint={runs[0]}", f"data.root={sample}")
    assert "not finite" in failed(capsys, f"checkpoint={runs[1]}", f"data.root={sample}")


def test_mistakes_are_told_in_words(run, sample, tmp_path, capsys):
    network, dataset = f"checkpoint={run}", f"data.root={sample}"
    one_class = sample / "train" / "red-dots"
    (tmp_path / "empty").mkdir()
    assert "labels are the names" in failed(capsys, network, f"data.root={one_class}")
    shutil.copytree(one_class, tmp_path / "one" / "red-dots")
    assert "all images lie in red-dots" in failed(capsys, network, f"data.root={tmp_path / 'one'}")
    assert "empty" in failed(capsys, network, f"data.root={tmp_path / 'empty'}")
    assert "does not exist" in failed(capsys, network, f"data.root={tmp_path / 'nowhere'}")
    assert "data.image_size=48" in failed(capsys, network, dataset, "data.image_size=50")
    assert "no such file" in failed(capsys, "checkpoint=runs/nowhere", dataset)
    assert "checkpoint" in failed(capsys, dataset)
    assert "data.root" in failed(capsys, network)
    assert "k.0" in failed(capsys, network, dataset, "k=[0]")


def test_images_that_leave_one_class_are_refused(run, sample, tmp_path, capsys):
    shutil.copytree(sample / "train" / "red-dots", tmp_path / "two" / "good")
    (tmp_path / "two" / "bad").mkdir()
    (tmp_path / "two" / "bad" / "x.png").write_bytes(b"no image")
    assert "all images that can be read are of one class" in failed(
        capsys, f"checkpoint={run}", f"data.root={tmp_path / 'two'}"
    )


def test_a_folder_in_the_place_of_a_record_is_refused_before_anything_is_measured(run, sample, tmp_path, capsys):
    for name in ("record.json", "record.npz", "record.png"):
        (tmp_path / name / "x").mkdir(parents=True)
        error = failed(capsys, f"checkpoint={run}", f"data.root={sample}", f"out={tmp_path / 'record.json'}")
        assert str(tmp_path / name) in error
        shutil.rmtree(tmp_path / name)


def test_wandb_receives_the_numbers_and_the_sheet_in_the_run_of_the_pretraining(run, sample):
    (run / "wandb_id.txt").write_text("abcd1234")
    offline = ["logger=wandb", "logger.offline=true", "figure=true", "k=[20]", "baselines=false"]
    measured("knn", f"checkpoint={run}", f"data.root={sample}", *offline)
    wandb.teardown()  # its process writes the file to its end
    (folder,) = (run / "wandb").glob("offline-run-*-abcd1234")
    content = (folder / "run-abcd1234.wandb").read_bytes()
    value = json.loads((run / "eval" / f"knn-{sample.name}.json").read_text())["score"]["metrics"][0]["value"]
    assert f"eval/knn-{sample.name}/top-1, k=20".encode() in content
    assert str(value)[:8].encode() in content
    assert list(folder.rglob("*.png"))


def test_wandb_has_a_run_of_its_own_where_there_was_no_pretraining(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["logger=wandb", "logger.offline=true", "k=[20]", "baselines=false", "data.image_size=32"]
    measured("knn", "checkpoint=random:vit_tiny_patch16_224", f"data.root={sample}", *words)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_without_wandb_at_hand_the_record_is_kept_and_the_way_on_is_told(run, sample, capsys, monkeypatch):
    def refuse(**settings):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    words = ["logger=wandb", "k=[20]", "baselines=false", "figure=false"]
    error = failed(capsys, f"checkpoint={run}", f"data.root={sample}", *words)
    assert "no API key" in error
    assert "logger.offline=true" in error
    assert (run / "eval" / f"knn-{sample.name}.json").is_file()


SOLVERS = {
    "logistic": ["l2=[1e-1,1e-3]"],
    "ridge": ["solver=ridge", "l2=[1e-1,1e-3]"],
    "sgd": ["solver=sgd", "sgd.lr=[0.01,0.1]", "sgd.epochs=3", "sgd.batch_size=64"],
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_measures_the_model_and_its_baselines(solver, run, sample, tmp_path):
    out = tmp_path / "out.json"
    measured("linear", f"checkpoint={run}", f"data.root={sample}", f"out={out}", *SOLVERS[solver])
    record = json.loads(out.read_text())
    assert record["task"] == ("linear" if solver == "logistic" else f"linear-{solver}")  # records of their own
    assert record["protocol"]["solver"].lower().startswith(solver)
    assert ("leave-one-out" in record["protocol"]["selection"]) == (solver == "ridge")
    for score in [record["score"], *record["baselines"]]:
        variants = 1 if score["name"] == "raw pixels" else 4
        trials = score["details"]["trials"]
        assert len(trials) == 2 * variants
        assert score["details"]["chosen"] in trials
        assert {"features", "accuracy", "loss"} < trials[0].keys()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_saved_probe_gives_the_answers_of_the_record(solver, run, sample, tmp_path, monkeypatch):
    """By the lines that its JSON names."""
    out = tmp_path / "out.json"
    monkeypatch.chdir(tmp_path)
    words = [f"checkpoint={run}", f"data.root={sample}", f"out={out}", "data.num_workers=0", "baselines=false"]
    record, _ = linear.measure(load_config("linear", [*words, *SOLVERS[solver]], LinearConfig))
    about = json.loads((tmp_path / "out.probe.json").read_text())
    answers = record.score.predictions[""]
    transform = EvalTransform(*(about["transform"][name] for name in ("image_size", "crop_ratio", "mean", "std")))
    dataset = scan_image_folder(sample / "test")
    images = transform.normalize(torch.stack([transform(dataset.read(int(place), 3)) for place in answers.indices]))
    names = {"images": images}
    exec("\n".join(about["apply"]), names)
    predicted = [about["classes"][place] for place in names["scores"].argmax(dim=1)]
    assert predicted == [dataset.classes[label] for label in answers.predicted]
    assert names["probe"].keys() == {"mean", "scale", "weight", "bias"}
    assert about["checkpoint"]["sha256"] == record.model.sha256


def test_a_record_of_other_settings_is_kept_with_its_files(run, sample, caplog):
    words = [f"checkpoint={run}", f"data.root={sample}", "baselines=false"]
    record = run / "eval" / f"knn-{sample.name}.json"
    measured("knn", *words, "k=5")
    first = json.loads(record.read_text())
    measured("knn", *words, "k=[5]", "figure=true")  # the same
    assert not (run / "eval" / "replaced").exists()
    again = json.loads(record.read_text())
    assert first["score"] == again["score"]
    measured("knn", *words, "k=7")
    assert "contained a result of other settings" in caplog.text
    kept = sorted(file.name for file in (run / "eval" / "replaced").iterdir())
    stem = f"knn-{sample.name}-{again['id'][:8]}"
    assert kept == [f"{stem}.json", f"{stem}.npz", f"{stem}.png"]
    assert json.loads((run / "eval" / "replaced" / f"{stem}.json").read_text()) == again
    assert json.loads(record.read_text())["protocol"]["k"] == [7]
    measured("knn", *words, "k=7", "figure=true")
    measured("knn", *words, "k=7")
    assert not record.with_suffix(".png").exists()  # no sheet of another evaluation is left beside it


def test_classes_that_are_never_tested_are_told(run, sample, tmp_path):
    shutil.copytree(sample, tmp_path / "few")
    for file in (tmp_path / "few" / "test" / "red-dots").iterdir():
        file.write_bytes(b"no image")
    measured("knn", f"checkpoint={run}", f"data.root={tmp_path / 'few'}", "baselines=false", "k=5")
    warnings = json.loads((run / "eval" / "knn-few.json").read_text())["warnings"]
    assert "1 of 12 classes have no test images: nothing is said of them" in warnings
