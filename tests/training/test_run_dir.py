"""Tests of the metrics file, of the printed schedules and of runs without readable images."""

import pytest

from ssl_vit.commands.pretrain import pretrain
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.console import schedule_table
from ssl_vit.training.loggers import ResumableCSVLogger
from tests.helpers.cli import rows


def test_resumable_csv_logger_merges_rows_of_a_step_and_adds_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = ResumableCSVLogger(path, done=0)
    metrics.log_metrics({"loss": 3.0}, step=0)
    metrics.log_metrics({"speed": 7.0}, step=0)
    metrics.log_metrics({"loss": 2.0}, step=1)
    metrics.log_metrics({"knn": 0.5, "loss": 1.0}, step=2)
    metrics.save()
    metrics.save()
    assert [(r["step"], r["loss"], r["speed"], r["knn"]) for r in rows(tmp_path)] == [
        ("0", "3.0", "7.0", ""),
        ("1", "2.0", "", ""),
        ("2", "1.0", "", "0.5"),
    ]


def test_resumable_csv_logger_drops_rows_behind_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.csv"
    first = ResumableCSVLogger(path, done=0)
    for step in range(6):  # steps 4 and 5 came after the last checkpoint
        first.log_metrics({"loss": float(step)}, step=step)
    first.save()
    resumed = ResumableCSVLogger(path, done=4)
    for step in range(4, 8):
        resumed.log_metrics({"loss": 10.0 + step}, step=step)
    resumed.save()
    assert [row["step"] for row in rows(tmp_path)] == list("01234567")
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "3.0", "14.0", "15.0", "16.0", "17.0"]


@pytest.mark.parametrize(
    "text",
    [
        "0,0,1.5\n1,0,1.4\n",
        "step;epoch;loss\n0;0;1,5\n",
        "step,epoch,loss\n0.0,0,1.5\n",
        "step,epoch,loss\n0,0\n1,0,1\n",
        "step,step,epoch\n0,0,0\n",
        "\0\0\0\n\0\n",
    ],
)
def test_resumable_csv_logger_sets_a_changed_file_aside(tmp_path, caplog, text):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    metrics = ResumableCSVLogger(path, done=2)
    assert "metrics.csv.damaged" in caplog.text
    assert path.with_name("metrics.csv.damaged").read_text() == text
    metrics.log_metrics({"loss": 2.0}, step=2)
    metrics.save()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("2", "2.0")]


def test_resumable_csv_logger_reads_a_byte_order_mark_and_windows_line_ends(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    path.write_bytes("\ufeffstep,epoch,loss\r\n0,0,1.5\r\n".encode())
    ResumableCSVLogger(path, done=2)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("0", "1.5")]
    path.unlink()
    ResumableCSVLogger(path, done=2)
    assert "metrics.csv is missing: the metrics of the first 2 steps are lost" in caplog.text


def test_schedule_table_of_a_short_run_shows_each_step_once():
    assert [line.split() for line in schedule_table({"lr": float}, [0, 0, 1, 2])] == [
        ["at", "step", "0", "1", "2"],
        ["lr", "0", "1", "2"],
    ]


def test_pretrain_without_readable_images_leaves_no_run(pretrain_config, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(UserError, match="read"):
            pretrain(pretrain_config(f"data.root={broken}"))
