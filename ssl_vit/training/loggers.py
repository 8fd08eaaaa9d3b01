"""metrics.csv: one row per logged step, on disk as soon as it is whole, continued without double rows on resume."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.launch import is_rank_zero


class ResumableCSVLogger(Logger):
    """Writes `metrics.csv` with the columns step (an optimizer step, from 0), epoch, and one per metric.

    Args:
        path: The file. Of the rows that it already holds, those of the steps done are kept.
        done: Optimizer steps that the run goes on from.
    """

    def __init__(self, path: Path, done: int) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step", "epoch"]
        self.row: dict[str, float | str] = {}  # of the latest step; other metrics of that step may still come
        self.latest = -1  # step that the file held when it was opened
        if is_rank_zero() and path.is_file():
            self.columns, rows = _read(path)
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
        """The configuration stands in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the row of `step`; a later step closes the row."""
        if self.row and self.row["step"] != step:
            self._close_row()
        self.row |= {"step": step or 0, **metrics}

    @rank_zero_only
    def save(self) -> None:
        """Close the row at hand, and bring all rows onto the disk."""
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
        """The last row."""
        self.save()


class ResumableWandbLogger(WandbLogger):
    """Weights & Biases, which keeps what it has received: rows that a resumed run computes again are not sent again.

    Args:
        behind: The last step whose row has been sent.
        settings: Of Lightning's logger.
    """

    def __init__(self, *, behind: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.behind = behind

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None or step > self.behind:
            super().log_metrics(metrics, step)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the whole rows; one that was cut off in the middle is left out."""
    whole = path.read_bytes().rpartition(b"\n")[0].decode("utf-8", "replace")
    reader = csv.DictReader(whole.splitlines())
    columns = list(reader.fieldnames or ["step", "epoch"])
    return columns, [row for row in reader if None not in row.values() and row["step"].isdecimal()]
