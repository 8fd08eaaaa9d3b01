"""`ssl-vit bench`: its measurements, its comparison of two configurations, and its only file."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import BenchConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.methods.flops import Flops
from ssl_vit.training.benchmark import BenchmarkRun, Model, Row, make_batch
from ssl_vit.training.benchmark_report import BenchmarkResult, bottleneck, format_result
from tests.conftest import SHRUNK, SHRUNK_DINO

SMALL = [word for word in SHRUNK if not word.startswith(("online.", "image_logging."))]
QUICK = [*SMALL, *SHRUNK_DINO, "seconds=0.2"]


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """The current folder and the temporary one."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def left_behind(tmp_path):
    return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} - {"tmp"}


def test_bench_without_images_generates_photos_and_reports_everything(tmp_path, capsys):
    assert main(["bench", *QUICK]) == 0
    assert left_behind(tmp_path) == {"bench.json", ".ssl-vit-outputs"}
    found = json.loads(Path("bench.json").read_text())
    assert found["schema"] == 1
    assert {"device", "cpu", "threads", "torch", "ssl_vit"} <= found["environment"].keys()
    (measured,) = found["measured"]
    assert measured["config"]["data"]["batch_size"] == measured["batch_size"] == 16
    assert measured["precision"] in ("32-true", "bf16-mixed")
    flops = measured["flops_per_image"]
    assert flops["total"] == flops["teacher"] + flops["student"] + flops["heads"]
    rows = measured["rows"]
    assert rows.keys() == {"data", "synthetic", "full"}
    assert all(row["images_per_s"] > 0 for row in rows.values())
    (full,) = rows["full"]["rounds"]
    step = sum(full["phases"].values())
    assert full["images_per_s"] == pytest.approx(16 / step, rel=1e-6)
    assert rows["full"]["peak_share"] == pytest.approx(rows["full"]["flops"] / measured["matmul_peak"])
    assert 0 < rows["full"]["peak_share"] < 1
    assert full["memory"]["host_gb"] > 0.1
    shown = capsys.readouterr().out
    for word in (
        "data only", "synthetic", "full", "TFLOP/s", "of peak", "augmentation", "teacher", "backward", "ema",
        "peak memory", "Bottleneck: ", "128 generated JPEG files of 500 x 375", "bench.json",
    ):  # fmt: skip
        assert word in shown


def test_bench_compares_two_configurations_in_turn(sample, tmp_path, capsys):
    words = [*QUICK, f"data.root={sample / 'train'}", "data.batch_size=2", "row=synthetic", "rounds=2"]
    words.append("out=two/found.json")
    assert main(["bench", *words, "compare_to=[backbone.depth=1,method.teacher.momentum=[0.9,1.0]]"]) == 0
    assert left_behind(tmp_path) == {"two", "two/found.json", "two/.ssl-vit-outputs"}
    found = json.loads(Path("two/found.json").read_text())
    assert [each["config"]["backbone"]["depth"] for each in found["measured"]] == [2, 1]
    assert found["measured"][1]["config"]["method"]["teacher"]["momentum"] == [0.9, 1.0]
    first, second = (each["rows"]["synthetic"]["rounds"] for each in found["measured"])
    comparison = found["comparison"]
    ratios = [b["images_per_s"] / a["images_per_s"] for a, b in zip(first, second, strict=True)]
    assert comparison["ratios"] == pytest.approx(ratios)
    assert len(ratios) == 2
    assert min(ratios) <= comparison["ratio"] <= max(ratios)
    output = capsys.readouterr()
    assert f"B / A = {comparison['ratio']:.2f}" in output.out
    turns = [line.partition("synthetic, ")[2] for line in output.err.splitlines() if "synthetic, " in line]
    assert turns == ["A of round 1", "B of round 1", "A of round 2", "B of round 2"]


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["compare_to=[trainer.precison=32-true]"], "nearest valid one is trainer.precision"),
        (["compare_to=[seconds=5]"], "seconds apply to both"),
        (["out=/dev/null"], "out=/dev/null is not a file"),
        (["compare_to=[backbone=vit_huge]"], "backbone=vit_huge: there is no such option"),
        (["compare_to=[backbone.name=resnet50]"], "resnet50"),
        (["data.root=empty"], "empty"),
        (["data.root=nowhere"], "nowhere"),
        (["data.source=cifar10"], "data.root"),
        (["trainer.devices=2"], "single process"),
        (["out=empty"], "out=empty is not a file"),
    ],
)
def test_bench_rejects_mistakes_before_the_measurements(tmp_path, capsys, words, messages):
    Path("empty").mkdir()
    assert main(["bench", *QUICK, *words]) == 2
    output = capsys.readouterr()
    assert messages in output.err
    assert "measuring" not in output.err
    assert left_behind(tmp_path) == {"empty"}


def test_bench_skips_and_counts_unreadable_images(sample, tmp_path, capsys):
    Path("photos").mkdir()
    for number, path in enumerate(sorted((sample / "train").rglob("*.png"))[:20]):
        Image.open(path).save(f"photos/{number}.png")
    Path("photos/broken.jpg").write_bytes(b"not an image")
    assert main(["bench", *QUICK, "data.root=photos"]) == 0
    assert "1 unreadable image skipped" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "batch_size"), [("dino", 5), ("sit", 4)])
def test_bench_shrinks_the_batch_of_long_steps(tmp_path, method, batch_size):
    own = SHRUNK_DINO if method == "dino" else ()
    config = load_config("bench", [*SMALL, *own, f"method={method}", "trainer.accumulate_grad_batches=2"], BenchConfig)
    subject = BenchmarkRun(config, range(16), SkippedImageLog(tmp_path / "skipped_images.txt"), seconds=0.1)
    subject.shrink(16)
    assert subject.config.trainer.accumulate_grad_batches == 2
    few = subject.largest_batch(1e-4)
    assert few in (0, 1, 2)
    subject.shrink(5)
    assert subject.config.data.batch_size == batch_size
    assert subject.config.trainer.accumulate_grad_batches == 1
    assert subject.largest_batch(100) > 16


INTERRUPTED = """
import signal, sys, tempfile
from ssl_vit.cli import main
from ssl_vit.training.benchmark import StepTimeRecorder
tempfile.tempdir = "tmp"
StepTimeRecorder.on_train_batch_end = lambda *_: signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(["bench", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bench_leaves_no_file_after_ctrl_c(tmp_path, num_workers):
    """In a process and session of its own, so that nothing else is interrupted."""
    words = [*QUICK, "data.batch_size=1", f"data.num_workers={num_workers}", "compare_to=[seed=1]"]
    command = [sys.executable, "-c", INTERRUPTED, *words]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "measuring: full, A" in done.stderr
    assert done.stderr.endswith("ssl-vit bench: stopped\n")
    assert done.stdout == ""
    assert left_behind(tmp_path) == set()


def measured(config, **parts):
    rows = {name: [Row(100, 10, parts, {"host_gb": 1.0})] for name in ("data", "synthetic", "full")}
    return BenchmarkResult(config, Model(Flops({"teacher": 10**9, "student": 10**9}, 10**9), "bf16-mixed"), 1e12, rows)


@pytest.mark.parametrize(
    ("parts", "messages"),
    [
        ({"data": 0.5, "backward": 0.5}, ["data, 50% of a step", "100 images/s", "data.cache_gb"]),
        ({"data": 0.01, "augmentation": 0.6, "backward": 0.39}, ["augmentation, 60%", "600 of 1,000 ms", "blur"]),
        ({"data": 0.01, "loss": 0.6, "backward": 0.39}, ["loss, 60%", "prototypes"]),
        ({"data": 0.01, "backward": 0.99}, ["backward, 99%", "30% of the matmul peak", "a larger data.batch_size"]),
    ],
)
def test_bottleneck_has_a_name_numbers_and_a_remedy(parts, messages):
    config = load_config("bench", [], BenchConfig)
    result = measured(config, **parts)
    sentence = bottleneck(result, torch.device("cpu"))
    assert sentence.startswith("Bottleneck: ")
    for message in messages:
        assert message in sentence
    assert "30%" in format_result(result)


def test_make_batch_returns_noise_in_the_shapes_of_the_config():
    config = load_config("bench", ["backbone=vit_cpu", "method.views.local_crops.size=24"], BenchConfig)
    batch = make_batch(config, 3, torch.device("cpu"))
    assert batch.global_views.shape == (3, 2, 3, 48, 48)
    assert batch.local_views.shape == (3, 8, 3, 24, 24)
