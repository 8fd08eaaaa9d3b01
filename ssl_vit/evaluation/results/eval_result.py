"""The result of one evaluation: its JSON file, the predictions beside it, and a table for the terminal."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, computed_field
from torch import Tensor

from ssl_vit.evaluation.results.provenance import package_info
from ssl_vit.evaluation.results.statistics import wilson
from ssl_vit.runtime.atomic_io import append_json, atomic_write, lock_file, write_json
from ssl_vit.runtime.text import format_table

SCHEMA = 3  # format of the JSON; grows when a key changes its meaning
ON_TEST = "test images"  # how `selection.on` begins where something was chosen on the test images,
LAST_EPOCH = ", last epoch"  # and how the names of the metrics end that were not chosen on them


def _finite_or_nan(value: Any) -> Any:  # noqa: ANN401 - any JSON
    return math.nan if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


Number = Annotated[float, BeforeValidator(_finite_or_nan)]  # NaN where there is none: null in the JSON


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Metric(_Part):
    """A metric over n test items with its 95 % interval."""

    name: str
    value: Number  # mostly a fraction in [0, 1]
    n: int  # test images, or what else the mean is over
    low: Number
    high: Number
    interval: str = "Wilson"  # how low and high were computed
    title: str = ""  # the metric in words, where its name is not enough
    note: str = ""  # what a reader must know of it
    level: Literal["score", "ground truth", "detail"] = "score"  # "ground truth": made with the mask it is scored on

    @property
    def over_subsets(self) -> bool:
        """Whether it is a mean over subsets of the training images: no single prediction is right or wrong."""
        return self.interval.endswith(" subsets")

    @property
    def percent(self) -> str:
        """The value in percent, with half of the interval's length."""
        return f"{100 * self.value:.1f} ± {50 * (self.high - self.low):.1f}"

    @property
    def is_number(self) -> bool:
        """Whether value and interval are numbers."""
        return not math.isnan(self.value + self.low + self.high)


class Predictions(NamedTuple):
    """Predictions for Q test images."""

    indices: Tensor  # (Q,) int64, of the images in the test set
    target: Tensor  # (Q,) int64, the labels
    predicted: Tensor  # (Q,) int64, the labels that were ranked first
    rank: Tensor  # (Q,) int64: number of classes before the true one; 0 is right, 2**31 is a class without a score


class ModelScores(_Part):
    """The metrics of one model or baseline."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str
    metrics: list[Metric]
    details: dict[str, Any] = {}  # what was selected or clamped on the way
    # Keyed by what follows "top-1" in the names of the metrics; they go to a file of their own.
    predictions: dict[str, Predictions] = Field(default={}, exclude=True, repr=False)


class ModelInfo(_Part):
    """The evaluated model."""

    name: str
    source: str
    sha256: str | None = None  # of its file
    state_sha256: str | None = None  # of its weights
    weights: str | None = None  # teacher or student
    run: str | None = None  # run directory
    epoch: int | None = None
    step: int | None = None
    params: int | None = None
    backbone: dict[str, Any] = {}
    normalization: dict[str, Any] = {}

    @property
    def identity(self) -> str | None:
        """Equal for the same model: the hash of its file, or else of its weights."""
        return self.sha256 or self.state_sha256


class DataInfo(_Part):
    """The evaluated images: their name, and whatever the evaluation adds."""

    model_config = ConfigDict(extra="allow")

    name: str

    def get(self, key: str) -> Any:  # noqa: ANN401 - any JSON; None if the evaluation did not add the key
        return (self.model_extra or {}).get(key)

    def identity(self) -> dict[str, Any]:
        """Return values that are equal for equal images."""
        return {key: self.get(key) for key in ("fingerprints", "fingerprint", "n_train", "n_test", "n_classes")}


class Selection(_Part):
    """What was selected (`chosen`), and on which images."""

    model_config = ConfigDict(extra="allow")

    on: str


class Change(_Part):
    """How a metric of a run changed since the weights that the run started from, on the same test images."""

    metric: str
    before: float
    after: float
    low: float  # of the 95 % interval of the paired difference
    high: float
    p: float  # of McNemar's exact test; of a mean of values per image, of the paired t-test

    def __str__(self) -> str:
        difference, half = 100 * (self.after - self.before), 50 * (self.high - self.low)
        return (
            f"{self.metric} since the start weights: from {100 * self.before:.1f} to {100 * self.after:.1f} "
            f"({difference:+.1f} ± {half:.1f}, paired)"
        )


class EvalResult(_Part):
    """One evaluation: everything that is needed to show it, to compare it, or to repeat it."""

    format: int = Field(default=SCHEMA, alias="schema")
    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))
    package: dict[str, Any] = Field(default_factory=package_info)
    task: str
    title: str = ""  # the task in words
    main_metrics: list[str] = []  # names of those that a summary shows; empty: all but details
    protocol: dict[str, Any]
    model: ModelInfo
    data: DataInfo
    selection: Selection | None = None
    seeds: dict[str, Any] = {}
    score: ModelScores
    baselines: list[ModelScores]
    changes: list[Change] = []  # since the start weights, for runs that began with some
    by_class: dict[str, Any] | None = None  # of the model, from `ConfusionSummary.to_dict`
    config: dict[str, Any] = {}  # of the command, without its output path
    cost: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    warnings: list[str] = []
    predictions_file: str | None = None  # name of the .npz beside the JSON
    path: Path = Field(default=Path(), exclude=True)  # that it was read from

    @computed_field
    def protocol_hash(self) -> str:
        """Equal for results that may be compared: the same task by the same protocol."""
        text = json.dumps({"task": self.task, **json_safe(self.protocol)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def protocol_items(self) -> dict[str, str]:
        """Everything that must agree within one column of a table: dotted keys, values as JSON."""
        return flatten({"protocol": self.protocol, "data": self.data.identity()})

    def is_main(self, metric: Metric) -> bool:
        """Return whether a summary shows this metric of the model."""
        return metric.name in self.main_metrics if self.main_metrics else metric.level == "score"

    def chosen_on_test(self, metric: str) -> bool:
        """Return whether a metric was selected on the test images, which makes it too high."""
        return self.selection is not None and self.selection.on.startswith(ON_TEST) and not metric.endswith(LAST_EPOCH)

    def same_setting(self, other: EvalResult) -> bool:
        """Return whether another result has the same task, protocol and images."""
        return self.protocol_hash == other.protocol_hash and self.data.identity() == other.data.identity()

    def write(self, path: Path) -> None:
        """Write the JSON atomically and append it to `history.jsonl` beside it.

        The predictions go to an `.npz` beside it, which is complete before the JSON names it.
        """
        arrays = {
            f"{score.name}{suffix}/{part}": _smallest_dtype(values.numpy())
            for score in (self.score, *self.baselines)
            for suffix, predictions in score.predictions.items()
            for part, values in predictions._asdict().items()
        }
        npz = sibling_path(path, ".npz")
        named = self.model_copy(update={"predictions_file": npz.name if arrays else None})
        content = json_safe(named.model_dump(by_alias=True))
        with lock_result(path):
            if arrays:
                with atomic_write(npz) as file:
                    np.savez_compressed(file, id=np.array(self.id), **arrays)  # type: ignore[arg-type]
            write_json(path, content)
            append_json(path.with_name("history.jsonl"), content)

    def table(self) -> str:
        """Return the scores in percent, the model's with its interval beside the baselines, and the warnings below."""
        data = self.data
        transform = self.protocol.get("transform")
        lines = [
            f"{self.task} on {data.name}: {data.get('n_test'):,} test images, {data.get('n_classes')} classes, "
            f"{data.get('n_train'):,} training images ({self.protocol['split']})",
            f"model: {self.model.source}{'' if self.model.step is None else f', step {self.model.step:,}'}"
            + (f"; images of {transform['image_size']} pixels" if transform else ""),
            *(f"{part}: {text}" for part in ("train", "test") if (text := data.get(f"{part}_images"))),
            *(f"classes: {', '.join(classes)}" for classes in [data.get("classes")] if classes),
        ]
        rows = [
            [metric.name, metric.percent, *(f"{100 * score.metrics[row].value:.1f}" for score in self.baselines)]
            for row, metric in enumerate(self.score.metrics)
        ]
        headers = ["accuracy in %", *(score.name for score in (self.score, *self.baselines))]
        changes = [f"\n{change}" for change in self.changes]
        warnings = [f"\nwarning: {text}" for text in self.warnings]
        return "\n".join([*lines, "", format_table(rows, headers), *changes, *warnings])


def topk_metrics(ranks: Tensor, classes: int, suffix: str = "") -> list[Metric]:
    """Return top-1, and top-5 for six classes or more, from the ranks (Q,) of the true classes."""
    metrics, n = [], len(ranks)
    for depth in (1, 5) if classes >= 6 else (1,):
        right = int((ranks < depth).sum())
        low, high = wilson(right, n)
        level: Literal["score", "detail"] = "score" if depth == 1 else "detail"
        metrics.append(Metric(name=f"top-{depth}{suffix}", value=right / n, n=n, low=low, high=high, level=level))
    return metrics


def sibling_path(path: Path, suffix: str) -> Path:
    """Return the path of a file that belongs to a result: its name with `.json` replaced by a suffix."""
    return path.with_name(f"{path.name.removesuffix('.json')}{suffix}")


@contextmanager
def lock_result(path: Path) -> Iterator[None]:
    """Create the folder of results and hold its lock, so that each result is written as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"{path}: another command is writing results into this folder; waiting for it to finish"
    with lock_file(path.with_name(".results.lock"), waiting=waiting):
        yield


def json_safe(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Return the same plain containers, with null for numbers that JSON does not have (NaN, infinities)."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested keys as dotted ones and their values as JSON: {"a": {"b": [1]}} as {"a.b": "[1]"}."""
    items: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            items |= flatten(value, f"{prefix}{key}.")
        else:
            items[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return items


def _smallest_dtype(values: npt.NDArray[np.int64]) -> npt.NDArray[np.integer[Any]]:
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return values.astype(np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)))
