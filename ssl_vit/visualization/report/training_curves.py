"""The curves of a run's metrics.csv, grouped by topic."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

from ssl_vit.visualization.report.report_data import Curve

POINTS = 300  # of a line; where a run has logged more, the means of as many stretches
Line = list[tuple[float, float]]  # (optimizer step, value)


class _Group(NamedTuple):
    title: str
    unit: str
    columns: dict[str, str]  # name of the line by column
    baseline: float | None = None


_LOSS = {
    "train/loss": "loss",
    "train/rotation": "rotation",
    "train/contrastive": "contrastive",
    "train/reconstruction": "reconstruction (L1)",
}
_ASSIGNMENT = {
    "train/teacher_entropy": "entropy",
    "train/teacher_kl_to_uniform": "KL to uniform",
    "train/assignment_mutual_information": "mutual information",
}
# Titles, units and shared axes of columns that are known; any other column of a method has axes of its own.
_GROUPS = (
    _Group("Loss", "nats", _LOSS),
    _Group("Teacher's assignment", "nats", _ASSIGNMENT),
    _Group("Accuracy on val images", "share right", {"val/top1": "top-1"}),
    _Group("Loss on val images", "nats", {"val/loss": "loss"}),
    _Group("Rotation accuracy", "share of images", {"train/rotation_accuracy": "rotation"}, baseline=0.25),
    _Group("Contrastive accuracy", "share of images", {"train/contrastive_accuracy": "other view"}),
    _Group("Standard deviation of the features", "0: all equal, 1: uniform", {"train/feature_std": "feature std"}),
    _Group("Effective rank of the features", "dimensions", {"train/effective_rank": "effective rank"}),
    _Group("Effective rank, fixed images", "dimensions", {"unlabeled/effective_rank": "effective rank"}),
    _Group("Alignment, fixed images", "squared distance", {"unlabeled/alignment": "alignment"}),
    _Group("Uniformity, fixed images", "nats", {"unlabeled/uniformity": "uniformity"}),
    _Group("Neighbors kept since the start", "share of the 10 nearest", {"unlabeled/neighbor_stability": "kept"}),
    _Group("Learning rate", "", {"schedule/lr": "learning rate"}),
    _Group("Weight decay", "", {"schedule/weight_decay": "weight decay"}),
    _Group("Teacher's momentum", "", {"schedule/teacher_momentum": "momentum"}),
    _Group("Teacher's temperature", "", {"schedule/teacher_temperature": "temperature"}),
    _Group("Throughput", "images/s", {"speed/images_per_s": "training"}),
)
_EARLIER_KNN = "knn/top1"  # a column of earlier versions


def load_curves(path: Path, prototypes: int | None) -> tuple[list[Curve], str]:
    """Load the curves of a metrics.csv and how they were made; none if there is no such file or no number in it.

    Online accuracies come first, each with the value before the first step. Constant schedules are omitted.

    Args:
        path: The file. Truncated and unnumbered rows are skipped; of a duplicate step the later
            value counts.
        prototypes: K of a run with a teacher, whose assignment has at most the entropy ln K.
    """
    if not path.is_file():
        return [], ""
    columns, excluded = _read_columns(path)
    lines = {name: line for name, line in columns.items() if line}
    curves = [_online_curve(name, line) for name, line in lines.items() if _is_online_accuracy(name)]
    known = {column for group in _GROUPS for column in group.columns}
    own = [name for name in lines if name.startswith(("train/", "schedule/")) and name not in known]
    for group in (*_GROUPS, *map(_own_group, own)):
        present = {name: lines[column] for column, name in group.columns.items() if column in lines}
        if len(present) == 2 and "loss" in present:  # the one part is all of it
            present = {"loss": present["loss"]}
        constant = len({value for line in present.values() for _, value in line}) == 1
        if present and not (constant and next(iter(group.columns)).startswith("schedule/")):
            drawn = {name: downsample_curve(line) for name, line in present.items()}
            baseline = math.log(prototypes) if group.columns is _ASSIGNMENT and prototypes else group.baseline
            curves.append(Curve(group.title, group.unit, drawn, baseline))
    return curves, _protocol(columns, excluded)


def downsample_curve(line: Line, most: int = POINTS) -> Line:
    """Reduce a line to at most `most` points: each the mean of consecutive values, at the last of their steps.

    Example:
        >>> downsample_curve([(0, 1.0), (1, 3.0), (2, 5.0)], most=2)
        [(1, 2.0), (2, 5.0)]
    """
    size = -(-len(line) // most)
    stretches = [line[start : start + size] for start in range(0, len(line), size)]
    return [(stretch[-1][0], math.fsum(value for _, value in stretch) / len(stretch)) for stretch in stretches]


def _read_columns(path: Path) -> tuple[dict[str, Line], dict[str, int]]:
    """Return the finite values of each column by step, and the number of other values by column."""
    whole = path.read_bytes().rpartition(b"\n")[0].decode("utf-8", "replace")
    reader = csv.DictReader(io.StringIO(whole.replace("\0", ""), newline=""))
    values: dict[str, dict[int, float]] = {name: {} for name in reader.fieldnames or ()}
    for row in reader:
        step = row.get("step") or ""
        if not step.isdecimal() or None in row or None in row.values():
            continue
        for name in values.keys() - {"step", "epoch"}:
            try:
                values[name][int(step)] = float(row[name])
            except ValueError:  # an empty cell, or no number at all
                continue
    excluded = {name: sum(not math.isfinite(v) for v in line.values()) for name, line in values.items()}
    finite = {name: sorted((float(s), v) for s, v in line.items() if math.isfinite(v)) for name, line in values.items()}
    return finite, {name: count for name, count in excluded.items() if count}


def _own_group(column: str) -> _Group:
    """Return a group of one column that is named after it."""
    name = column.partition("/")[2].replace("_", " ")
    return _Group(name.capitalize(), "", {column: name})


def _is_online_accuracy(column: str) -> bool:
    return column == _EARLIER_KNN or (column.startswith(("online/", "reference/")) and not column.endswith("/seconds"))


def _online_curve(column: str, line: Line) -> Curve:
    """Return an accuracy curve with the value before the first step as its baseline."""
    images, _, name = column.partition("/")
    kind, _, k = name.partition("@")
    of = "Accuracy on the reference images" if images == "reference" else "Online accuracy"
    title = f"{of}, " + {"knn": f"kNN, k = {k}", "linear": "linear head"}.get(kind, "kNN")
    return Curve(title, "share right", {name: downsample_curve(line)}, line[0][1] if line[0][0] == 0 else None)


def _protocol(columns: dict[str, Line], excluded: dict[str, int]) -> str:
    rows = max((len(line) for line in columns.values()), default=0)
    texts = [f"From the {rows:,} rows of metrics.csv; steps are optimizer steps, from 0."]
    if rows > POINTS:
        texts.append(f"Of longer lines each point is the mean of {-(-rows // POINTS)} rows.")
    texts.append(
        "A dashed level is what the weights before the first step reach, for accuracies; ln K, the largest entropy "
        "that K prototypes allow, for the teacher's assignment; chance, for rotations. Information is what the "
        "assignment tells about an image: the entropy of its mean over images, less its mean entropy."
    )
    if "train/reconstruction" in columns:
        texts.append("The parts of the loss are shown before they are weighted.")
    if excluded:
        counts = ", ".join(f"{count:,} of {name}" for name, count in sorted(excluded.items()))
        texts.append(f"Left out, for they are no finite numbers: {counts}.")
    return " ".join(texts)
