"""Tests of the memory that a step needs: said before training, refused where the machine has less."""

import pytest

from ssl_vit.cli import main
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.runtime.host_memory import HostMemory, host_memory
from ssl_vit.training import memory_estimate
from ssl_vit.training.memory_estimate import estimate_step
from ssl_vit.training.trainer import build_method
from tests.conftest import SHRUNK, SHRUNK_DINO

GB = 10**9


def step(*words):
    config = load_config("pretrain", ["data.root=x", "trainer.accelerator=cpu", *words], PretrainConfig)
    method = build_method(config, TrainingPlan(100, 10, config.data.batch_size, 1, 0))
    return estimate_step(method, dtype=None, activation_checkpointing=config.trainer.activation_checkpointing)


def test_estimate_step_is_near_what_was_measured():
    """Peak memory of a process on CPU, above what it had before, float32: 0.83 GB for SiT with 8 images."""
    assert step("method=sit", "backbone=vit_tiny").total(8) == pytest.approx(0.83 * GB, rel=0.3)


def test_estimate_step_finds_small_patches_and_default_local_crops():
    words = ["backbone=vit_tiny", "backbone.img_size=32", "backbone.patch_size=4", "method.views.global_crops.size=32"]
    large = step(*words)
    assert large.total(64) > 20 * GB  # with the default batch
    assert step(*words, "method.views.local_crops.size=16").per_image < large.per_image / 20
    assert step(*words, "trainer.activation_checkpointing=true").per_image < large.per_image


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_check_host_memory_refuses_before_training(
    pretrain_words, sample, tmp_path, tiny_model, monkeypatch, capsys, command
):
    memory = [HostMemory(available=10**5, total=10**5)]
    monkeypatch.setattr(memory_estimate, "host_memory", lambda: memory[0])
    words = pretrain_words()
    if command == "finetune":
        shrunk = [word for word in SHRUNK if word.startswith(("data.", "trainer"))]
        words = [
            *shrunk,
            f"checkpoint={tiny_model}",
            f"data.root={sample / 'train'}",
            f"run.folder={tmp_path / 'runs'}",
        ]
    assert main([command, *words]) == 2
    message = capsys.readouterr().err
    assert "a step of 16 images needs about" in message
    assert "trainer.activation_checkpointing=true" in message
    assert not list((tmp_path / "runs").rglob("config.yaml"))
    memory[0] = HostMemory(available=10**5, total=10**12)
    assert main([command, *words]) == 0
    assert "Memory: a step of 16 images needs about" in capsys.readouterr().out


def test_check_host_memory_names_values_that_fit(pretrain_words, monkeypatch, capsys):
    monkeypatch.setattr(memory_estimate, "host_memory", lambda: HostMemory(available=3 * GB, total=4 * GB))
    words = [word for word in (*SHRUNK, *SHRUNK_DINO) if "batch_size" not in word]
    root = next(word for word in pretrain_words() if word.startswith("data.root"))
    assert main(["pretrain", *words, root, "data.batch_size=40960"]) == 2
    assert "trainer.accumulate_grad_batches=" in capsys.readouterr().err


def test_host_memory_of_a_container(tmp_path):
    (tmp_path / "proc").mkdir()
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    assert host_memory(tmp_path) is None
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 6000 kB\nSwapTotal: 1000 kB\n")
    assert host_memory(tmp_path) == (6000 << 10, 9000 << 10)
    (group / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == (6000 << 10, 9000 << 10)
    (group / "memory.max").write_text(f"{4000 << 10}\n")
    (group / "memory.current").write_text(f"{1000 << 10}\n")
    assert host_memory(tmp_path) == (3000 << 10, 4000 << 10)
