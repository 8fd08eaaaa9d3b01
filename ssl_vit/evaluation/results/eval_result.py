"""A result and how it came about: one JSON file per evaluation, and a table for the terminal."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ssl_vit.evaluation.results.provenance import package_info
from ssl_vit.evaluation.results.statistics import wilson
from ssl_vit.runtime.atomic_io import atomic_write, write_json

SCHEMA = 2  # of the JSON; grows when a key changes its meaning
ON_TEST = "test images"  # how `selection.on` begins where they were chosen by,
LAST_EPOCH = ", last epoch"  # and how the names of those metrics end that were not


@dataclass(frozen=True)
class Metric:
    """A share of test images, with its interval: by default Wilson's, of 95 %, for other test images."""

    name: str
    value: float  # in [0, 1]
    n: int  # test images
    low: float
    high: float
    interval: str = "Wilson"  # how low and high came about


class Predictions(NamedTuple):
    """What was answered of each of Q test images."""

    place: Tensor  # (Q,) int64, in the set of test images
    truth: Tensor  # (Q,) int64, the labels
    predicted: Tensor  # (Q,) int64, the labels that came first
    rank: Tensor  # (Q,) int64: how many classes came before the true one; 0 is right


@dataclass(frozen=True)
class ModelScores:
    """What one model (or baseline) reached."""

    name: str
    metrics: list[Metric]
    details: dict[str, Any]  # what was chosen or clamped on the way
    answers: dict[str, Predictions] = field(default_factory=dict)  # by what follows "top-1" in the names of the metrics


@dataclass(frozen=True)
class EvalResult:
    """One evaluation: everything that is needed to compare it, or to repeat it."""

    task: str
    protocol: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    selection: dict[str, Any] | None = field(default=None, kw_only=True)  # what was chosen, and by which images
    seeds: dict[str, Any]
    score: ModelScores
    baselines: list[ModelScores]
    by_class: dict[str, Any] | None = field(default=None, kw_only=True)  # the model's mistakes, told by `Mistakes`
    config: dict[str, Any] = field(default_factory=dict, kw_only=True)  # of the command, but where it writes to
    cost: dict[str, Any]
    environment: dict[str, Any]
    warnings: list[str]

    def write(self, path: Path) -> None:
        """Write the JSON at once: no reader ever sees half of it; then add it to `history.jsonl` beside it.

        What was answered of each image lies beside it, too, in an `.npz` that is there before the JSON names it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        answers = {
            f"{score.name}{suffix}/{part}": _smallest(values.numpy())
            for score in (self.score, *self.baselines)
            for suffix, given in score.answers.items()
            for part, values in given._asdict().items()
        }
        if answers:
            with atomic_write(sibling_path(path, ".npz")) as file:
                np.savez_compressed(file, id=np.array(name), **answers)  # type: ignore[arg-type]
        content = {
            "schema": SCHEMA,
            "id": name,
            "created": datetime.now(UTC).isoformat(timespec="microseconds"),
            "tool": package_info(),
            "protocol_hash": protocol_hash(self.task, self.protocol),
            **asdict(self, dict_factory=_without_answers),
            "answers": sibling_path(path, ".npz").name if answers else None,
        }
        write_json(path, json_safe(content))
        _append(path.with_name("history.jsonl"), json_safe(content))

    def table(self) -> str:
        """The scores side by side in percent: the model with its interval, then the baselines; warnings below."""
        data = self.data
        lines = [
            f"{self.task} on {data['name']}: {data['n_test']:,} test images, {data['n_classes']} classes, "
            f"{data['n_train']:,} training images ({self.protocol['split']})",
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


def sibling_path(record: Path, suffix: str) -> Path:
    """The file that belongs to a record: its name with another suffix in the place of `.json`."""
    return record.with_name(f"{record.name.removesuffix('.json')}{suffix}")


def topk_metrics(ranks: Tensor, classes: int, suffix: str = "") -> list[Metric]:
    """Top-1, and top-5 where there are at least six classes, from the ranks (Q,) of the true classes."""
    depths = [1, 5] if classes >= 6 else [1]
    return [_metric(f"top-{depth}{suffix}", ranks < depth) for depth in depths]


def protocol_hash(task: str, protocol: Mapping[str, Any]) -> str:
    """Equal for results that may be compared: the same task by the same protocol."""
    text = json.dumps({"task": task, **protocol}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_answers(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name != "answers"}


def _smallest(values: npt.NDArray[np.int64]) -> npt.NDArray[np.integer[Any]]:
    """The same whole numbers in the smallest type that holds them all."""
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return values.astype(np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)))


def json_safe(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """The same plain containers; what JSON has no number for (NaN, infinities) becomes null."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, content: object) -> None:
    """Add a line of JSON; one that was cut off before stays a line of its own."""
    line = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
    with path.open("a+b", buffering=0) as file:  # one write, so lines of two processes do not mix
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


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


log = logging.getLogger(__name__)


def archive_previous_result(path: Path, record: EvalResult) -> None:
    """Move what stands at `path`, and its files, to `replaced/` unless it is an earlier form of the same record.

    That is one of the same model, by the same protocol, on the same images.
    """
    try:
        standing = json.loads(path.read_bytes())
        name = str(standing["id"])[:8]
        known = standing["protocol_hash"], standing["model"]["sha256"], standing["data"]["fingerprints"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or nothing that is worth keeping
        return
    new = protocol_hash(record.task, record.protocol), record.model["sha256"], record.data["fingerprints"]
    if known == new:
        return
    folder = path.parent / "replaced"
    folder.mkdir(exist_ok=True)
    for file in path.parent.glob(f"{glob.escape(path.stem)}.*"):
        file.replace(folder / f"{path.stem}-{name}{file.name.removeprefix(path.stem)}")
    log.warning(f"{path} held a record of other settings, images or weights: it is kept in {folder}")
