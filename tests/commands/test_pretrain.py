"""Tests of `ssl-vit pretrain`: what a run writes, its determinism, and its messages."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.synthetic import make_synthetic_dataset
from ssl_vit.models.checkpoint import load_backbone, random_init_like
from tests.helpers.cli import assert_same_weights, rows, run_command, state


@pytest.mark.parametrize("method", ["dino", "sit"])
def test_pretrain_writes_config_metrics_and_backbone(pretrain_config, method):
    run = pretrain(pretrain_config(f"method={method}", "online.every_epochs=1", "trainer.max_steps=13"))
    assert {"config.yaml", "metrics.csv", "backbone.safetensors", "backbone.json"} <= {p.name for p in run.iterdir()}
    metrics = rows(run)
    assert [int(row["step"]) for row in metrics] == list(range(13))
    for name in ("train/loss", "train/feature_std", "train/effective_rank", "schedule/lr", "speed/images_per_s"):
        assert all(row[name] for row in metrics), name
    assert all(0 <= float(row["speed/data_wait"]) <= 1 for row in metrics)
    assert [row["step"] for row in metrics if row["online/knn@20"]] == ["0", "11", "12"]  # start, epoch 1, end
    from_run, exported = load_backbone(str(run)), load_backbone(str(run / "backbone.safetensors"))
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(from_run.backbone(images).cls, exported.backbone(images).cls, rtol=0, atol=0)
    assert from_run.run == exported.run == run
    assert ("teacher" in from_run.source) == (method == "dino")


def test_pretrain_with_accumulation_updates_teacher_and_center_once_per_step(pretrain_config):
    """One batch of 16 and two micro-batches of 8 give the same model, teacher and center."""
    words = ("trainer.max_steps=4", "trainer.precision=32-true", "backbone.drop_path=0.0")
    whole = pretrain(pretrain_config(*words, "run.name=whole"))
    halves = pretrain(pretrain_config(*words, "trainer.accumulate_grad_batches=2", "run.name=halves"))
    (first, steps), (second, other_steps) = state(whole), state(halves)
    assert steps == other_steps == 4
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=2e-5)
    assert first["center.value"].abs().max() > 0


def test_pretrain_is_determined_by_its_seed(pretrain_config):
    first, again, other = (
        pretrain(pretrain_config(f"run.name={name}", f"seed={seed}")) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_same_weights(first, again)
    assert not torch.equal(state(first)[0]["center.value"], state(other)[0]["center.value"])


def test_pretrain_does_not_depend_on_data_workers(pretrain_config):
    inside = pretrain(pretrain_config("run.name=inside", "data.cache_gb=0", "data.num_workers=0"))
    outside = pretrain(pretrain_config("run.name=outside", "data.cache_gb=0", "data.num_workers=2"))
    assert_same_weights(inside, outside)


def test_pretrain_never_overwrites_a_run_unasked(pretrain_words, tmp_path, capsys):
    words = pretrain_words("trainer.max_steps=1")
    assert main(["pretrain", *words]) == 0
    before = (tmp_path / "runs" / "dino" / "metrics.csv").stat().st_mtime_ns
    assert main(["pretrain", *words]) == 2
    message = capsys.readouterr().err
    for way in ("run.resume=true", "run.overwrite=true", "run.name"):
        assert way in message
    assert (tmp_path / "runs" / "dino" / "metrics.csv").stat().st_mtime_ns == before
    assert main(["pretrain", *words, "run.overwrite=true"]) == 0


def test_pretrain_skips_counts_and_lists_unreadable_images(pretrain_words, sample, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    good = sorted((sample / "train").rglob("*.png"))[:16]
    for number, path in enumerate(good):
        (folder / f"{number}.png").write_bytes(path.read_bytes())
    (folder / "broken one.jpg").write_bytes(b"this is no image")
    for memory in (1.0, 0.0):
        words = pretrain_words(f"data.root={folder}", f"data.cache_gb={memory}", "run.overwrite=true")
        assert main(["pretrain", *words, "trainer.max_steps=20"]) == 0
        assert "1 image could not be read" in capsys.readouterr().out
        assert "broken one.jpg" in (tmp_path / "runs" / "dino" / "skipped_images.txt").read_text()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data.root=nowhere", "nowhere"),
        ("method.optimizer.warmup=100steps", "warm-up of 100 steps does not fit into a run of 4 steps"),
        ("backbone.name=resnet50", "resnet50"),
        ("backbone.in_chans=2", "in_chans=2"),
        ("method.views.local_crops.size=20", "not a multiple"),
    ],
)
def test_pretrain_reports_mistakes_before_anything_is_written(pretrain_words, tmp_path, capsys, word, says):
    assert main(["pretrain", *pretrain_words(word)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_pretrain_with_one_channel(pretrain_config):
    run = pretrain(
        pretrain_config("backbone.in_chans=1", "method.views.mean=[0.5]", "method.views.std=[0.25]", "run.name=gray")
    )
    assert load_backbone(str(run)).backbone(torch.rand(1, 1, 48, 48)).cls.shape == (1, 32)


def test_pretrain_keeps_its_wandb_run_across_a_resume(pretrain_words, tmp_path):
    words = pretrain_words("logger=wandb", "logger.offline=true", "trainer.max_steps=3")
    done = run_command(words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "dino"
    name = (run / "wandb_id.txt").read_text()
    assert list((run / "wandb").glob(f"offline-run-*-{name}"))
    again = run_command([*words, "run.resume=true"])
    assert again.returncode == 0, again.stderr
    assert (run / "wandb_id.txt").read_text() == name


def test_pretrain_with_accumulation_logs_by_optimizer_step(pretrain_config):
    """Before the first step there is no row of metrics to judge, though a batch has ended."""
    words = (
        "trainer.accumulate_grad_batches=2",
        "method.optimizer.warmup=0steps",
        "trainer.log_every_n_steps=2",
        "trainer.max_steps=4",
    )
    assert [row["step"] for row in rows(pretrain(pretrain_config(*words)))] == ["1", "3"]


def test_pretrain_accepts_too_few_labeled_images_for_knn(pretrain_config, tmp_path):
    """Four images in class folders: none to spare for queries."""
    folder = tmp_path / "few"
    make_synthetic_dataset(folder, num_images=5, seed=0)
    run = pretrain(pretrain_config(f"data.root={folder / 'train'}", "data.batch_size=4", "online.every_epochs=1"))
    assert state(run)[1] == 4
    assert "online/knn@20" not in rows(run)[0]


def test_data_range_travels_from_the_training_to_evaluations_export_and_further_training(pretrain_words, tmp_path):
    """Two classes of 12 bits that differ in brightness alone: stretched one by one, they look the same."""
    ramp = np.arange(32 * 32).reshape(32, 32)
    for label, scale in (("dark", 1), ("bright", 3)):
        for number in range(12):
            path = tmp_path / "deep" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((np.roll(ramp, 37 * number) * scale).astype(np.uint16)).save(path)
    words = [*pretrain_words(f"data.root={tmp_path / 'deep'}", "data.batch_size=8"), "data.range=[0, 4095]"]
    run = pretrain(load_config("pretrain", words, PretrainConfig))
    for checkpoint in (run, run / "backbone.safetensors", run / "checkpoints" / "last.ckpt"):
        loaded = load_backbone(checkpoint)
        assert str(loaded.value_range) == "[0, 4095]"
        assert str(random_init_like(loaded, 0).value_range) == "[0, 4095]"
    scores = {}
    for given in ("null", "auto"):
        out = tmp_path / f"{given}.json"
        common = [f"checkpoint={run}", f"data.root={tmp_path / 'deep'}", "k=[1]", f"out={out}"]
        assert main(["knn", *common, f"data.range={given}"]) == 0
        result = json.loads(out.read_text())
        scores[given] = result["score"]["metrics"][0]["value"]
        assert ("value_range" in result["protocol"]["transform"]) == (given == "null")
        assert any("data.range=[0, 4095]" in text for text in result["warnings"]) == (given == "null")
    assert scores["null"] == 1
    assert scores["auto"] < 0.8
    further = [word for word in words if not word.startswith(("backbone", "data.range", "run."))]
    config = load_config("pretrain", [*further, f"checkpoint={run}"], PretrainConfig)
    assert str(config.data.range) == "[0, 4095]"


def test_runs_inside_the_image_folder_are_no_images(pretrain_words, tmp_path):
    make_synthetic_dataset(tmp_path / "photos", num_images=60, seed=0)
    root = tmp_path / "photos" / "train"
    words = [*pretrain_words("image_logging.every_epochs=1", f"run.folder={root / 'runs'}"), f"data.root={root}"]
    before = scan_image_folder(root)
    run = pretrain(load_config("pretrain", words, PretrainConfig))
    assert list((run / "images").glob("*.jpg"))
    after = scan_image_folder(root)
    assert list(after.names) == list(before.names)
    assert after.classes == before.classes
    pretrain(load_config("pretrain", [*words, "run.resume=true"], PretrainConfig))  # the images have not changed


def test_pretrain_refuses_a_run_directory_that_links_to_itself(pretrain_words, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "loop").symlink_to("loop")
    assert main(["pretrain", *pretrain_words("run.name=loop")]) == 2
    assert "Traceback" not in capsys.readouterr().err
