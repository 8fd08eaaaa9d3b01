"""Tests of the published linear protocols: their parts, their results, and exact resuming."""

import json
import math
import shutil

import pytest
import torch
from filelock import FileLock
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR

from ssl_vit.cli import main
from ssl_vit.commands.linear import evaluate as published_probe
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import LinearConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.sources.synthetic import make_synthetic_dataset
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.training import published_linear as published
from ssl_vit.training.published_protocols import dino_probe, sit_probe
from tests.helpers.cli import state


def make_model(**sizes):
    torch.manual_seed(0)
    small = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 3}
    config = {"name": "vit_tiny_patch16_224", "drop_path": 0.1, "init": "jax", "reg_tokens": 0, **small, **sizes}
    return Backbone(BackboneConfig(**config)).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, registers in (("plain", 0), ("two", 1)):
        model = make_model(reg_tokens=registers)
        export_backbone(model, folder / f"{name}.safetensors", mean=[0.5] * 3, std=[0.25] * 3, source="a test")
    return folder


@pytest.fixture
def words(models, sample, tmp_path):
    def make(protocol, *more):
        name = {"dino": "plain", "sit": "two"}[protocol]
        return [
            f"checkpoint={models / name}.safetensors", f"data.root={sample}", "data.batch_size=32",
            "data.num_workers=0",
            f"protocol={protocol}", "epochs=3", "figure=false", f"out={tmp_path / 'record.json'}", *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def config(words):
    return lambda *more: load_config("linear", words(*more), LinearConfig)


def folder_of(record, seed=0):
    return record.with_name(f"{record.stem}-seed{seed}")


def without_time(path):
    record = json.loads(path.read_text())
    for part in ("id", "created", "cost", "predictions_file"):  # the file of the answers is named after the record
        record.pop(part)
    record["score"]["details"].pop("seconds")
    record["score"]["details"].pop("run")
    return record


# --- what is published -----------------------------------------------------------------------------------------


def test_dino_probe_learning_rate_is_the_cosine_of_torch():
    probe = dino_probe(make_model(), 5, epochs=None, batch_size=1024)
    assert probe.epochs == 100
    assert any("smaller batch of an epoch" in text for text in probe.about["not reproduced"])
    (group,) = probe.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.9, 0.0, pytest.approx(0.004))
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.004)
    schedule = CosineAnnealingLR(reference, 100, eta_min=0)
    for epoch in range(100):
        assert probe.lr(epoch) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-6)
        reference.step()
        schedule.step()


def test_sit_probe_learning_rate_is_the_cosine_of_timm_with_warmup():
    probe = sit_probe(make_model(reg_tokens=1), 5, epochs=None, batch_size=480)
    assert probe.epochs == 501
    reference = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3 * 480 / 512)
    schedule = CosineLRScheduler(reference, t_initial=501, lr_min=5e-6, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(501):
        assert probe.lr(epoch) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-6), epoch
        schedule.step(epoch + 1)


@pytest.mark.parametrize(("width", "depth", "inputs"), [(32, 2, 64), (32, 6, 128), (768, 1, 1536)])
def test_dino_probe_features_are_four_class_tokens_or_the_last_with_the_patch_mean(width, depth, inputs):
    model = make_model(embed_dim=width, depth=depth, img_size=16)
    probe = dino_probe(model, 5, epochs=1, batch_size=8)
    images = torch.rand(2, 3, 16, 16)
    (features,) = probe.features(model, images)
    assert features.shape == (2, inputs)
    tokens = model.get_intermediate_tokens(images, depth)
    wanted = (
        torch.cat([tokens[-1].cls, tokens[-1].patches.mean(dim=1)], dim=1)
        if width == 768
        else torch.cat([block.cls for block in tokens[-4:]], dim=1)
    )
    torch.testing.assert_close(features, wanted)
    (head,) = probe.heads["linear"]
    assert head.in_features == inputs
    assert not head.bias.any()
    assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.2)


def test_sit_probe_logits_are_the_mean_of_two_heads_and_its_loss_their_sum():
    model = make_model(reg_tokens=1)
    probe = sit_probe(model, 5, epochs=1, batch_size=8)
    features = probe.features(model, torch.rand(4, 3, 48, 48))
    targets = torch.softmax(torch.randn(4, 5), dim=1)
    total = 0.0
    for name in ("linear", "nonlinear"):
        first, second = probe.heads[name]
        logits = [first(features[0]), second(features[1])]
        torch.testing.assert_close(probe.logits(name, features), (logits[0] + logits[1]) / 2)
        total += sum(-(targets * one.log_softmax(dim=1)).sum(dim=1).mean() for one in logits)
    torch.testing.assert_close(probe.loss(features, targets), total)
    one, tanh, other = probe.heads["nonlinear"][0]
    assert (one.in_features, one.out_features, other.in_features, type(tanh)) == (32, 1024, 1024, torch.nn.Tanh)
    assert [group["weight_decay"] for group in probe.optimizer.param_groups] == [5e-4, 0.0]


# --- as a user sees it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "heads"), [("dino", ["", ", last epoch"]), ("sit", [", linear", ", linear, last epoch",
                            ", nonlinear", ", nonlinear, last epoch"])]
)  # fmt: skip
def test_published_probe_reports_its_selection_and_the_last_epoch(config, protocol, heads):
    record, path = published_probe(config(protocol, "figure=true"))
    assert [metric.name for metric in record.score.metrics[::2]] == [f"top-1{suffix}" for suffix in heads]
    assert list(record.score.predictions) == heads
    assert record.protocol["selection"].startswith("on the test images")
    assert any("chosen on the test images" in text for text in record.warnings)
    assert record.protocol["not reproduced"]
    for suffix, metric in zip(heads, record.score.metrics[::2], strict=True):
        answers = record.score.predictions[suffix]
        assert float((answers.predicted == answers.target).float().mean()) == pytest.approx(metric.value)
        looks = record.score.details["looks"][next(h for h in ("nonlinear", "linear") if h in suffix or h == "linear")]
        wanted = looks[-1][1] if "last" in suffix else max(accuracy for _, accuracy in looks)
        assert metric.value == pytest.approx(wanted)
    assert json.loads(path.read_text())["task"] == f"linear-{protocol}"
    best = record.score.details["best_epoch"]
    assert record.selection.model_dump() == {"on": "test images", "chosen": {"epoch": best}}
    assert set(best) == {"dino": {"linear"}, "sit": {"linear", "nonlinear"}}[protocol]
    for head, epoch in best.items():
        looks = dict(record.score.details["looks"][head])
        assert looks[epoch] == max(looks.values())
    assert record.by_class["metric"] == f"top-1{heads[1]}"  # that nothing was chosen for
    assert path.with_name(record.by_class["figure"]).is_file()


def test_published_probe_learns_and_leaves_the_backbone_unchanged(config, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    make_synthetic_dataset(folder, num_images=600, seed=3)
    seen = []
    original = published.on_best_device

    def remembered(loaded):
        seen.append(loaded.backbone)
        return original(loaded)

    monkeypatch.setattr(published, "on_best_device", remembered)
    given = config("dino", f"data.root={folder}", "epochs=6", "data.batch_size=16")
    before = {name: value.clone() for name, value in load_backbone(given.checkpoint).backbone.state_dict().items()}
    record, path = published_probe(given)
    (backbone,) = seen
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not backbone.training
    lines = [json.loads(line) for line in (folder_of(path) / "epochs.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(math.log(12), abs=0.3)
    assert record.score.metrics[0].n == 120


@pytest.mark.parametrize("stop", [8, 12])  # within the second of three epochs of six steps, and at its end
@pytest.mark.parametrize("protocol", ["dino", "sit"])
def test_published_probe_stopped_and_resumed_equals_uninterrupted(config, stop_at, protocol, stop, tmp_path, capsys):
    whole = published_probe(config(protocol, f"out={tmp_path / 'whole.json'}"))[1]
    with stop_at(stop), pytest.raises(KeyboardInterrupt):
        published_probe(config(protocol))
    assert f"Stopped and saved after step {stop} of 18. Resume with the same command." in capsys.readouterr().out
    parts = published_probe(config(protocol))[1]
    assert without_time(whole) == without_time(parts)
    first, second = (folder_of(path) for path in (whole, parts))
    assert (first / "epochs.jsonl").read_text() == (second / "epochs.jsonl").read_text()
    weights = [state(folder)[0] for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any("backbone" in name for name in weights[0])  # it is frozen

    capsys.readouterr()
    again = published_probe(config(protocol))[1]
    assert "is already complete" in capsys.readouterr().out
    assert without_time(again) == without_time(whole)


def test_published_probe_refuses_the_directory_of_another_protocol(config):
    published_probe(config("dino", "epochs=1"))
    with pytest.raises(UserError, match="contains a probe with another protocol"):
        published_probe(config("dino", "epochs=2"))


@pytest.mark.parametrize("damage", [("last.ckpt",), ("last.ckpt", "previous.ckpt")])
def test_published_probe_survives_a_damaged_checkpoint(config, stop_at, tmp_path, capsys, damage):
    whole = published_probe(config("dino", f"out={tmp_path / 'whole.json'}"))[1]
    for stop in (5, 8):
        with stop_at(stop), pytest.raises(KeyboardInterrupt):
            published_probe(config("dino"))
    checkpoints = folder_of(tmp_path / "record.json") / "checkpoints"
    for name in damage:
        (checkpoints / name).write_bytes(b"half a checkpoint")
    if len(damage) == 2:
        with pytest.raises(UserError, match=r"every checkpoint in .* delete .* to start from scratch"):
            published_probe(config("dino"))
        return
    parts = published_probe(config("dino"))[1]
    assert "last.ckpt is damaged: resuming from the checkpoint before it" in capsys.readouterr().out
    assert without_time(whole) == without_time(parts)


def test_published_probe_keeps_a_second_command_out(config, tmp_path):
    with FileLock(tmp_path / ".record-seed0.lock"), pytest.raises(UserError, match=r"use out=OTHER\.json"):
        published_probe(config("dino"))


def test_published_probe_keeps_a_directory_per_seed(config, capsys):
    first, path = published_probe(config("dino", "epochs=1"))
    other, _ = published_probe(config("dino", "epochs=1", "seed=1"))
    assert "already complete" not in capsys.readouterr().out
    assert (first.seeds["evaluation"], other.seeds["evaluation"]) == (0, 1)
    weights = [state(folder_of(path, seed))[0] for seed in (0, 1)]
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    again, _ = published_probe(config("dino", "epochs=1"))
    assert "already complete" in capsys.readouterr().out
    assert again.score.metrics == first.score.metrics


def test_published_probe_refuses_another_precision(config, monkeypatch):
    monkeypatch.setattr(published, "autocast_dtype", lambda device: None)
    published_probe(config("dino", "epochs=1"))
    monkeypatch.setattr(published, "autocast_dtype", lambda device: torch.bfloat16)
    with pytest.raises(UserError, match="another precision of the model"):
        published_probe(config("dino", "epochs=1"))


@pytest.mark.parametrize("part", ["train", "test"])
def test_published_probe_refuses_images_of_other_sizes(config, sample, tmp_path, part):
    folder = tmp_path / "images"
    shutil.copytree(sample, folder)
    published_probe(config("dino", "epochs=1", f"data.root={folder}"))
    image = sorted((folder / part).rglob("*.png"))[0]
    image.write_bytes(image.read_bytes() + b" ")
    with pytest.raises(UserError, match="another dataset"):
        published_probe(config("dino", "epochs=1", f"data.root={folder}"))


def test_published_probe_restarts_where_other_test_images_are_readable(config, sample, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(sample, folder)
    words = ("dino", "epochs=2", f"data.root={folder}")
    whole = published_probe(config(*words))[1]
    wanted = without_time(whole)
    broken = [sorted((folder / part).rglob("*.png"))[0] for part in ("train", "test")]
    good = [image.read_bytes() for image in broken]
    for image, content in zip(broken, good, strict=True):
        image.write_bytes(bytes(len(content)))  # as large as before
    capsys.readouterr()
    less, _ = published_probe(config(*words))
    assert "starts from scratch" in capsys.readouterr().out
    assert (less.data.get("n_test"), less.data.get("skipped"), less.score.metrics[0].n) == (47, 2, 47)
    for image, content in zip(broken, good, strict=True):
        image.write_bytes(content)
    published_probe(config(*words))
    assert "starts from scratch" in capsys.readouterr().out
    assert without_time(whole) == wanted
    assert len((folder_of(whole) / "epochs.jsonl").read_text().splitlines()) == 2


def test_published_probe_runs_in_the_first_process_only(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["linear", *words("dino")]) == 0
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_published_probe_skips_and_counts_unreadable_images(config, tmp_path):
    folder = tmp_path / "images"
    make_synthetic_dataset(folder, num_images=60, seed=0)
    for part in ("train", "test"):
        sorted((folder / part).rglob("*.png"))[0].with_name(f"broken {part}.png").write_bytes(b"this is no image")
    record, _ = published_probe(config("dino", f"data.root={folder}", "epochs=1"))
    assert record.data.get("skipped") == 2
    assert record.score.metrics[0].n == 12
    assert any("2 images could not be read" in text for text in record.warnings)


@pytest.mark.parametrize(
    ("protocol", "more", "says"),
    [
        ("sit", ["checkpoint={models}/plain.safetensors"], "protocol=sit reads two tokens"),
        ("sit", ["data.batch_size=31"], "data.batch_size=31: protocol=sit mixes images in pairs"),
        ("dino", ["protocol=held-out", "epochs=2"], "epochs applies to protocol=dino and protocol=sit"),
        ("dino", ["data.root={sample}/train"], "protocol=dino is chosen on test images"),
        ("dino", ["protocol=mae"], "protocol"),
    ],
)
def test_linear_reports_mistakes_of_published_protocols(words, models, sample, capsys, protocol, more, says):
    more = [word.format(models=models, sample=sample) for word in more]
    assert main(["linear", *words(protocol, *more)]) == 2
    assert says in capsys.readouterr().err
