"""Loggers of metrics: `metrics.csv` and Weights & Biases, both continued without duplicate rows on resume."""

from __future__ import annotations

import csv
import io
import logging
import os
import uuid
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ssl_vit.config.pretrain import LoggerConfig
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.training.run_dir import RunState

log = logging.getLogger(__name__)


class ResumableCSVLogger(Logger):
    """Writer of `metrics.csv` with the columns step (optimizer step, from 0), epoch, and one per metric.

    Args:
        path: The file. Rows that it already contains are kept up to the resumed step.
        done: Optimizer steps that the run resumes from.
    """

    def __init__(self, path: Path, done: int) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step", "epoch"]
        self.row: dict[str, float | str] = {}  # of the latest step; more metrics of that step may follow
        self.latest = -1  # last step in the file when it was opened
        if is_rank_zero() and done and not path.is_file():
            log.warning(f"{path} is missing: the metrics of the first {done:,} steps are lost")
        if is_rank_zero() and path.is_file():
            rows: list[dict[str, str]] = []
            try:
                self.columns, rows = _read(path)
            except ValueError as error:
                path.replace(aside := path.with_name(f"{path.name}.damaged"))
                log.warning(f"{path} is damaged ({error}): it is kept as {aside.name}, and metrics start again")
            self.latest = max((int(row["step"]) for row in rows), default=-1)
            self._rewrite([row for row in rows if int(row["step"]) < done])

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the config is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of `step`; a later step closes the row."""
        if self.row and self.row["step"] != step:
            self._close_row()
        self.row |= {"step": step or 0, **metrics}

    @rank_zero_only
    def save(self) -> None:
        """Close the current row and sync the file to disk."""
        self._close_row()
        if self.path.is_file():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())

    def _close_row(self) -> None:
        if not self.row:
            return
        if new := [name for name in self.row if name not in self.columns]:
            rows = _read(self.path)[1] if self.path.is_file() else []
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(self.row)
        self.row = {}

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(self.path) as file:
            file.write(text.getvalue().encode())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last row."""
        self.save()


class ResumableWandbLogger(WandbLogger):
    """Weights & Biases logger that does not send again the rows, up to step `last_sent`, that a resumed run repeats."""

    def __init__(self, *, last_sent: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.last_sent = last_sent

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None or step > self.last_sent:
            super().log_metrics(metrics, step)


def make_loggers(config: LoggerConfig, run: RunState, *, hyperparameters: dict[str, Any]) -> list[Logger]:
    """Make the logger of `metrics.csv` and, if configured, of wandb, whose run id is kept in the run directory."""
    metrics = ResumableCSVLogger(run.path / "metrics.csv", run.done)
    if config.name != "wandb":
        return [metrics]
    id_file = run.path / "wandb_id.txt"
    if is_rank_zero() and not (id_file.exists() and id_file.read_text(encoding="utf-8")):
        with atomic_write(id_file) as file:
            file.write(uuid.uuid4().hex[:8].encode())
    wandb = ResumableWandbLogger(
        last_sent=metrics.latest,
        project=config.project,
        name=run.path.name,
        id=id_file.read_text(encoding="utf-8") if is_rank_zero() else None,
        resume="allow",
        save_dir=run.path,
        mode="offline" if config.offline else None,
    )
    wandb.log_hyperparams(hyperparameters)
    return [metrics, wandb]


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the complete rows; the last one is dropped if it was cut off.

    Raises:
        ValueError: The file was changed: its header or a row is not what this class writes.
    """
    whole = path.read_bytes().rpartition(b"\n")[0].decode("utf-8-sig", "replace")
    lines = whole.splitlines()
    if not lines:
        return ["step", "epoch"], []
    columns = next(csv.reader(lines[:1]))
    if not {"step", "epoch"} <= set(columns) or len(set(columns)) < len(columns):
        raise ValueError("its first line has no columns step and epoch")
    rows: list[dict[str, str]] = []
    for number, values in enumerate(csv.reader(lines[1:]), start=2):
        row = dict(zip(columns, values, strict=False))
        if len(values) != len(columns) or not (row["step"].isascii() and row["step"].isdecimal()):
            raise ValueError(f"line {number} is no row of metrics")
        if rows and int(row["step"]) <= int(rows[-1]["step"]):
            raise ValueError(f"line {number} has a step that is not after the one before")
        rows.append(row)
    return columns, rows
