"""Records read back: what a table needs of them, and what was answered of each image."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssl_vit.evaluation.results.eval_result import LAST_EPOCH, ON_TEST, SCHEMA, Predictions
from ssl_vit.runtime.errors import UserError


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class SavedMetric(_Part):
    """As `records.Metric`; null where the number was none."""

    name: str
    value: float | None
    n: int
    low: float | None
    high: float | None
    interval: str

    @property
    def over_subsets(self) -> bool:
        """Whether it is a mean over subsets of the training images: no one image is right or wrong."""
        return self.interval.endswith(" subsets")


class SavedScore(_Part):
    """As `records.Score`."""

    name: str
    metrics: list[SavedMetric]


class SavedModel(_Part):
    """Which model it was."""

    name: str
    sha256: str | None
    state_sha256: str | None = None  # older records lack it
    source: str
    weights: str | None = None  # teacher or student, where it was said
    step: int | None = None

    @property
    def identity(self) -> str | None:
        """Equal for the same model: the hash of its file, without one that of its weights."""
        return self.sha256 or self.state_sha256


class SavedEnvironment(_Part):
    """What the numbers were computed with."""

    forward: str | None = None  # type of the model's numbers


class SavedSelection(_Part):
    """What was chosen, and by which images."""

    on: str


class SavedData(_Part):
    """Which images they were."""

    model_config = ConfigDict(extra="allow")

    name: str

    def identity(self) -> dict[str, Any]:
        """What is equal for equal images."""
        given = self.model_extra or {}
        return {key: given.get(key) for key in ("fingerprints", "fingerprint", "n_train", "n_test", "n_classes")}


class SavedResult(_Part):
    """What a table needs of a record."""

    id: str
    created: str
    task: str
    protocol: dict[str, Any]
    protocol_hash: str
    model: SavedModel
    data: SavedData
    score: SavedScore
    baselines: list[SavedScore]
    answers: str | None
    environment: SavedEnvironment
    selection: SavedSelection | None = None
    warnings: list[str]
    config: dict[str, Any] = Field(default_factory=dict)  # of the command
    path: Path = Path()
    told: dict[str, str] = Field(default_factory=dict)  # what must agree in a column: dotted keys, values as JSON

    def chosen_on_test(self, metric: str) -> bool:
        """Whether a metric was chosen by the test images, so that it is too high."""
        return self.selection is not None and self.selection.on.startswith(ON_TEST) and not metric.endswith(LAST_EPOCH)


# What damage in an .npz file has been seen to provoke.
_DAMAGE = (
    OSError,
    LookupError,
    ValueError,
    EOFError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


class _NoRecordError(ValueError):
    """A file that is no record that can be read; the text says why."""


class LoadedResults(NamedTuple):
    """The records that were named, and what was left out of the folders that were."""

    records: list[SavedResult]
    left_out: list[str]


def find_records(places: list[Path]) -> LoadedResults:
    """Records by their files, and all records of run folders (in their `eval/`) or of other folders.

    Raises:
        UserError: A file is no record of this schema, or a folder holds none; what is in the way is said.
    """
    records: dict[str, SavedResult] = {}
    left_out: list[str] = []
    for place in places:
        if not os.path.isdir(place):  # noqa: PTH112 - it takes names that no file system does
            try:
                record = read_record(place)
            except _NoRecordError as error:
                raise UserError(f"{place}: {error}") from None
            records.setdefault(record.id, record)
            continue
        folder = place / "eval" if (place / "eval").is_dir() else place
        read, refused = [], []
        for file in sorted(set(folder.glob("*.json")) - set(folder.glob("*.probe.json"))):  # classifiers beside them
            try:
                read.append(read_record(file))
            except _NoRecordError as error:
                refused.append(f"{file}: {error}")
        if not read:
            reasons = "".join(f"\n  {line}" for line in refused)
            raise UserError(f"{folder}: there is no record in this folder; knn, linear and others write them{reasons}")
        left_out += refused
        for record in read:
            records.setdefault(record.id, record)
    return LoadedResults(list(records.values()), left_out)


def read_record(path: Path) -> SavedResult:
    """One record.

    Raises:
        ValueError: It is none, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _NoRecordError("there is no such file or folder") from None
    except OSError as error:
        raise _NoRecordError(f"it cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _NoRecordError("this is no JSON file, so no record") from None
    if not isinstance(content, dict) or "schema" not in content or "task" not in content:
        raise _NoRecordError("this is not a record that an evaluation of ssl-vit writes")
    if content["schema"] != SCHEMA:
        raise _NoRecordError(
            f"a record of schema {content['schema']!r}, and schema {SCHEMA} is read here; measure again to compare it"
        )
    try:
        record = SavedResult.model_validate(content)
        told = flat({"protocol": record.protocol, "data": record.data.identity()})
        return record.model_copy(update={"path": path, "told": told})
    except RecursionError:
        raise _NoRecordError("a record that was damaged: its protocol is nested too deeply") from None
    except ValidationError as error:
        keys = ", ".join(sorted({".".join(map(str, mistake["loc"])) for mistake in error.errors()}))
        raise _NoRecordError(f"a record that was changed by hand or damaged: look at {keys}") from None


def read_answers(record: SavedResult, suffix: str) -> Predictions | None:
    """What the model answered of each image, for the metrics that end in `suffix`; None if that is not there."""
    if record.answers is None:
        return None
    try:
        path = record.path.with_name(Path(record.answers).name)
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["id"]) != record.id:  # of a later evaluation into the same file
                return None
            parts = [arrays[f"{record.score.name}{suffix}/{part}"].astype(np.int64) for part in Predictions._fields]
    except _DAMAGE:
        return None
    answers = Predictions(*map(torch.from_numpy, parts))
    return answers if {tuple(part.shape) for part in answers} == {(len(answers.place),)} else None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys as dotted ones, values as JSON.

    Example:
        >>> flat({"k": [20], "transform": {"image_size": 32}})
        {'k': '[20]', 'transform.image_size': '32'}
    """
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return found
