"""metrics.csv and checkpoints survive what happens to them."""

import csv

import pytest
import torch

from ssl_vit.commands.pretrain import pretrain
from ssl_vit.errors import UserError
from ssl_vit.training.metrics import MetricsCSV


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_one_step_share_a_row_and_new_columns_may_come_later(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsCSV(path, done=0)
    metrics.log_metrics({"loss": 3.0}, step=0)
    metrics.log_metrics({"speed": 7.0}, step=0)
    metrics.log_metrics({"loss": 2.0}, step=1)
    metrics.log_metrics({"knn": 0.5, "loss": 1.0}, step=2)
    metrics.save()
    metrics.save()
    assert [(r["step"], r["loss"], r["speed"], r["knn"]) for r in rows(path)] == [
        ("0", "3.0", "7.0", ""),
        ("1", "2.0", "", ""),
        ("2", "1.0", "", "0.5"),
    ]


def test_metrics_go_on_behind_the_steps_that_are_done(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path, done=0)
    for step in range(6):  # steps 4 and 5 came after the last checkpoint
        first.log_metrics({"loss": float(step)}, step=step)
    first.save()
    resumed = MetricsCSV(path, done=4)
    for step in range(4, 8):
        resumed.log_metrics({"loss": 10.0 + step}, step=step)
    resumed.save()
    assert [row["step"] for row in rows(path)] == list("01234567")
    assert [row["loss"] for row in rows(path)] == ["0.0", "1.0", "2.0", "3.0", "14.0", "15.0", "16.0", "17.0"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(pretrain_config, monkeypatch):
    """As on a full disk: the write fails half-way."""
    import lightning as L

    original = L.Trainer.save_checkpoint

    def full_disk(self, path, *args, **kwargs):
        if self.global_step > 3:
            path.write_bytes(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        original(self, path, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full_disk)
    config = pretrain_config("trainer.checkpoint_every=0s", "trainer.max_steps=9")  # after every step
    with pytest.raises(OSError, match="No space left"):
        pretrain(config)
    monkeypatch.undo()
    resumed = pretrain_config("trainer.max_steps=9", "run.resume=true")
    assert [row["step"] for row in rows(pretrain(resumed) / "metrics.csv")] == [str(step) for step in range(9)]


def test_a_diverged_network_is_not_saved(pretrain_config, monkeypatch):
    from ssl_vit.methods.dino import DINO

    original = DINO.step

    def explode(self, *batch):
        result = original(self, *batch)
        return result._replace(loss=result.loss * (float("nan") if self.global_step >= 4 else 1))

    monkeypatch.setattr(DINO, "step", explode)
    config = pretrain_config("trainer.checkpoint_every=0s", "trainer.max_steps=9")
    with pytest.raises(UserError, match="diverged"):
        pretrain(config)
    content = torch.load(config.run.path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 4
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_a_damaged_checkpoint_is_told_in_words(pretrain_config):
    run = pretrain(pretrain_config())
    (run / "checkpoints" / "last.ckpt").write_bytes(b"half a checkpoint")
    with pytest.raises(UserError, match=r"last\.ckpt"):
        pretrain(pretrain_config("run.resume=true"))


def test_a_folder_without_readable_pictures_leaves_no_run_behind(pretrain_config, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(UserError, match="read"):
            pretrain(pretrain_config(f"data.root={broken}"))
