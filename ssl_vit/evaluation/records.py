"""A result and how it came about: one JSON file per evaluation, and a table for the terminal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from ssl_vit import __version__
from ssl_vit.durable import write_json
from ssl_vit.training.hardware import autocast_dtype

SCHEMA = 1  # of the JSON; grows when a key changes its meaning


@dataclass(frozen=True)
class Metric:
    """A share of test pictures, with its interval: by default Wilson's, of 95 %, for other test pictures."""

    name: str
    value: float  # in [0, 1]
    n: int  # test pictures
    low: float
    high: float
    interval: str = "Wilson"  # how low and high came about


class Answers(NamedTuple):
    """What was answered of each of Q test pictures."""

    place: Tensor  # (Q,) int64, in the set of test pictures
    truth: Tensor  # (Q,) int64, the labels
    predicted: Tensor  # (Q,) int64, the labels that came first
    rank: Tensor  # (Q,) int64: how many classes came before the true one; 0 is right


@dataclass(frozen=True)
class Score:
    """What one network (or baseline) reached."""

    name: str
    metrics: list[Metric]
    details: dict[str, Any]  # what was chosen or clamped on the way
    answers: dict[str, Answers] = field(default_factory=dict)  # by what follows "top-1" in the names of the metrics


@dataclass(frozen=True)
class Record:
    """One evaluation: everything that is needed to compare it, or to repeat it."""

    task: str
    protocol: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    seed: int  # of the random network, and of splits
    score: Score
    baselines: list[Score]
    seconds: float
    environment: dict[str, Any]
    warnings: list[str]

    def write(self, path: Path) -> None:
        """Write the JSON at once: no reader ever sees half of it."""
        content = {
            "schema": SCHEMA,
            "tool": {"name": "ssl-vit", "version": __version__},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "protocol_hash": protocol_hash(self.task, self.protocol),
            **asdict(self, dict_factory=_without_answers),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    def table(self) -> str:
        """The scores side by side in percent: the network with its interval, then the baselines; warnings below."""
        data = self.data
        lines = [
            f"{self.task} on {data['name']}: {data['n_test']:,} test pictures, {data['n_classes']} classes, "
            f"{data['n_train']:,} training pictures ({self.protocol['split']})",
            "",
        ]
        scores = [self.score, *self.baselines]
        cells = [["accuracy in %", *(score.name for score in scores)]]
        for row, metric in enumerate(self.score.metrics):
            half = (metric.high - metric.low) / 2
            values = [f"{100 * score.metrics[row].value:.1f}" for score in self.baselines]
            cells.append([metric.name, f"{100 * metric.value:.1f} ± {100 * half:.1f}", *values])
        lines += _columns(cells)
        lines += [f"\nwarning: {text}" for text in self.warnings]
        return "\n".join(lines)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score (1927): it stays in [0, 1] and holds for few pictures too.

    Example:
        >>> low, high = wilson(8, 10)
        >>> f"{low:.3f} {high:.3f}"
        '0.490 0.943'
    """
    z = 1.959964
    share = right / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracies(ranks: Tensor, classes: int, suffix: str = "") -> list[Metric]:
    """Top-1, and top-5 where there are at least six classes, from the ranks (Q,) of the true classes."""
    depths = [1, 5] if classes >= 6 else [1]
    return [_metric(f"top-{depth}{suffix}", ranks < depth) for depth in depths]


def protocol_hash(task: str, protocol: Mapping[str, Any]) -> str:
    """Equal for results that may be compared: the same task by the same protocol."""
    text = json.dumps({"task": task, **protocol}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were computed with."""
    dtype = autocast_dtype(device) or torch.float32
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "forward": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _without_answers(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name != "answers"}


def _metric(name: str, right: Tensor) -> Metric:
    count, n = int(right.sum()), len(right)
    low, high = wilson(count, n)
    return Metric(name, count / n, n, low, high)


def _columns(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
