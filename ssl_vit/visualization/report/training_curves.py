"""The curves of a run's metrics.csv, grouped by topic."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

from ssl_vit.visualization.report.schema import Curve

POINTS = 300  # of a line; where a run has logged more, the means of as many stretches
Line = list[tuple[float, float]]  # (optimizer step, value)


class _Group(NamedTuple):
    title: str
    unit: str
    columns: dict[str, str]  # name of the line by column


GROUPS = (
    _Group(
        "Loss",
        "nats",
        {
            "train/loss": "loss",
            "train/rotation": "rotation",
            "train/contrastive": "contrastive",
            "train/reconstruction": "reconstruction (L1)",
        },
    ),
    _Group(
        "Teacher's assignment",
        "nats",
        {
            "train/teacher_entropy": "entropy",
            "train/teacher_kl_to_uniform": "KL to uniform",
            "train/assignment_mutual_information": "mutual information",
        },
    ),
    _Group("Accuracy on val images", "share right", {"val/top1": "top-1"}),
    _Group("Loss on val images", "nats", {"val/loss": "loss"}),
    _Group("Rotation accuracy", "share of images", {"train/rotation_accuracy": "rotation"}),
    _Group("Contrastive accuracy", "share of images", {"train/contrastive_accuracy": "other view"}),
    _Group("Standard deviation of the features", "0: all equal, 1: uniform", {"train/feature_std": "feature std"}),
    _Group("Effective rank of the features", "dimensions", {"train/effective_rank": "effective rank"}),
    _Group("Learning rate", "", {"schedule/lr": "learning rate"}),
    _Group("Weight decay", "", {"schedule/weight_decay": "weight decay"}),
    _Group("Teacher's momentum", "", {"schedule/teacher_momentum": "momentum"}),
    _Group("Teacher's temperature", "", {"schedule/teacher_temperature": "temperature"}),
    _Group("Throughput", "images/s", {"speed/images_per_s": "training"}),
)
CHANCE_OF_ROTATION = 0.25
EARLIER_KNN = "knn/top1"  # a column of earlier versions
NO_SCORE = "online/seconds"


class Metrics(NamedTuple):
    """The curves, and how they were made."""

    curves: list[Curve]
    how: str


def load_curves(path: Path, prototypes: int | None) -> Metrics:
    """Load the curves of a metrics.csv; none if there is no such file or no number in it.

    Online accuracies come first, each with the value of random weights. Constant schedules are omitted.

    Args:
        path: The file. Truncated and unnumbered rows are skipped; of a duplicate step the later
            value counts.
        prototypes: K of a run with a teacher, whose assignment has at most the entropy ln K.
    """
    if not path.is_file():
        return Metrics([], "")
    columns, no_number = _columns(path)
    curves = [_online(name, line) for name, line in columns.items() if _is_score(name) and line]
    for group in GROUPS:
        lines = {name: columns[column] for column, name in group.columns.items() if columns.get(column)}
        if len(lines) == 2 and "loss" in lines:  # the one part is all of it
            del lines[next(name for name in lines if name != "loss")]
        constant = len({value for line in lines.values() for _, value in line}) == 1
        if lines and not (constant and next(iter(group.columns)).startswith("schedule/")):
            drawn = {name: downsample_curve(line) for name, line in lines.items()}
            curves.append(Curve(group.title, group.unit, drawn, _level(group, prototypes)))
    return Metrics(curves, _how(columns, no_number))


def downsample_curve(line: Line, most: int = POINTS) -> Line:
    """Reduce a line to at most `most` points: each the mean of consecutive values, at the last of their steps.

    Example:
        >>> downsample_curve([(0, 1.0), (1, 3.0), (2, 5.0)], most=2)
        [(1, 2.0), (2, 5.0)]
    """
    size = -(-len(line) // most)
    stretches = [line[start : start + size] for start in range(0, len(line), size)]
    return [(stretch[-1][0], math.fsum(value for _, value in stretch) / len(stretch)) for stretch in stretches]


def _columns(path: Path) -> tuple[dict[str, Line], dict[str, int]]:
    """Return the finite values of each column by step, and the number of other values by column."""
    whole = path.read_bytes().rpartition(b"\n")[0].decode("utf-8", "replace")
    reader = csv.DictReader(io.StringIO(whole.replace("\0", ""), newline=""))
    values: dict[str, dict[int, float]] = {name: {} for name in reader.fieldnames or ()}
    for row in reader:
        step = row.get("step") or ""
        if not step.isdecimal() or None in row or None in row.values():
            continue
        for name in values.keys() - {"step", "epoch"}:
            if (value := _number(row[name])) is not None:
                values[name][int(step)] = value
    no_number = {name: sum(not math.isfinite(v) for v in line.values()) for name, line in values.items()}
    finite = {name: sorted((float(s), v) for s, v in line.items() if math.isfinite(v)) for name, line in values.items()}
    return finite, {name: count for name, count in no_number.items() if count}


def _number(text: str) -> float | None:
    """None for an empty cell and for what is no number at all."""
    try:
        return float(text)
    except ValueError:
        return None


def _is_score(column: str) -> bool:
    return column == EARLIER_KNN or (column.startswith("online/") and column != NO_SCORE)


def _online(column: str, line: Line) -> Curve:
    """Return an accuracy curve with the value before the first step, that of random weights, as its baseline."""
    name = column.partition("/")[2]
    kind, _, k = name.partition("@")
    title = "Online accuracy, " + {"knn": f"kNN, k = {k}", "linear": "linear head"}.get(kind, "kNN")
    return Curve(title, "share right", {name: downsample_curve(line)}, line[0][1] if line[0][0] == 0 else None)


def _level(group: _Group, prototypes: int | None) -> float | None:
    if "train/teacher_entropy" in group.columns and prototypes:
        return math.log(prototypes)
    return CHANCE_OF_ROTATION if "train/rotation_accuracy" in group.columns else None


def _how(columns: dict[str, Line], no_number: dict[str, int]) -> str:
    rows = max((len(line) for line in columns.values()), default=0)
    texts = [f"From the {rows:,} rows of metrics.csv; steps are optimizer steps, from 0."]
    if rows > POINTS:
        texts.append(f"Of longer lines each point is the mean of {-(-rows // POINTS)} rows.")
    texts.append(
        "A dashed level is what random weights reach, for accuracies; ln K, the largest entropy that K prototypes "
        "allow, for the teacher's assignment; chance, for rotations. Information is what the assignment tells about a "
        "image: the entropy of its mean over images, less its mean entropy."
    )
    if "train/reconstruction" in columns:
        texts.append("The parts of the loss are shown before they are weighted.")
    if no_number:
        texts.append("Left out, for they are no finite numbers: " + _listed(no_number) + ".")
    return " ".join(texts)


def _listed(no_number: dict[str, int]) -> str:
    return ", ".join(f"{count:,} of {name}" for name, count in sorted(no_number.items()))
