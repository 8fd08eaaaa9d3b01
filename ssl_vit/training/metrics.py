"""metrics.csv: one row per logged step, on disk as soon as it is whole, continued without double rows on resume."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from ssl_vit.distributed import first_process


class MetricsCSV(Logger):
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
        if first_process() and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                rows = [row for row in reader if int(row["step"]) < done]
            self._rewrite(rows)

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
            self.save()
        self.row |= {"step": step or 0, **metrics}

    @rank_zero_only
    def save(self) -> None:
        """Write the row at hand."""
        if not self.row:
            return
        if new := [name for name in self.row if name not in self.columns]:
            rows: list[dict[str, Any]] = []
            if self.path.is_file():
                with self.path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(self.row)
        self.row = {}

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The last row."""
        self.save()
