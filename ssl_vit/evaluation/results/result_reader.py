"""Find and read the results of evaluations, and the predictions beside them."""

from __future__ import annotations

import glob
import json
import logging
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from ssl_vit.evaluation.results.eval_result import SCHEMA, EvalResult, Predictions
from ssl_vit.runtime.errors import UserError

log = logging.getLogger(__name__)

# Exceptions that damaged .npz files have been seen to raise.
_DAMAGE = (OSError, LookupError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


# Files that other commands and the training write beside results.
_OTHER_FILES = {"backbone", "data", "source", "head", "protocol", "scan", "inspect", "transfer"}


class InvalidResultError(ValueError):
    """A file that contains no readable result; the message gives the reason without the file's name."""


class LoadedResults(NamedTuple):
    """The results that were found, and the reasons for skipped files."""

    results: list[EvalResult]
    skipped: list[str]


def find_results(paths: list[Path]) -> LoadedResults:
    """Read result files, and all results in run directories (in their `eval/`) or in other folders.

    Raises:
        UserError: A named file is no readable result, or a folder contains none.
    """
    results: dict[str, EvalResult] = {}
    skipped: list[str] = []
    for path in paths:
        is_folder = os.path.isdir(path)  # noqa: PTH112 - unlike Path.is_dir it takes names that are too long
        folder = path / "eval" if is_folder and (path / "eval").is_dir() else path
        found, invalid = [], []
        for file in _result_files(folder) if is_folder else [path]:
            try:
                found.append(read_result(file))
            except InvalidResultError as error:
                invalid.append(f"{file}: {error}")
        if not found and not is_folder:
            raise UserError(invalid[0])
        if not found:
            reasons = "".join(f"\n  {line}" for line in invalid)
            raise UserError(f"{folder} contains no result. Run `ssl-vit knn` or another evaluation first.{reasons}")
        for result in found:
            results.setdefault(result.id, result)
        skipped += invalid
    return LoadedResults(list(results.values()), skipped)


def _result_files(folder: Path) -> list[Path]:
    """Return the JSON files of a folder without those that are known to be something else."""
    files = sorted(folder.glob("*.json"))
    return [file for file in files if file.stem not in _OTHER_FILES and file.suffixes[-2:] != [".probe", ".json"]]


def read_result(path: Path) -> EvalResult:
    """Read one result.

    Raises:
        InvalidResultError: The file is damaged, is no result, or has the format of another version.
    """
    try:
        # Reading a pipe would wait for its other end.
        content = None if path.is_fifo() else json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidResultError("no such file or folder") from None
    except OSError as error:
        raise InvalidResultError(f"the file cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InvalidResultError("not a JSON file, so not a result") from None
    if not isinstance(content, dict) or "schema" not in content or "task" not in content:
        raise InvalidResultError("not a result that an evaluation of ssl-vit wrote")
    if content["schema"] != SCHEMA:
        raise InvalidResultError(
            f"written by {_writer(content)} in format {content['schema']!r}; this version reads format {SCHEMA}. "
            "Run the evaluation again to compare it"
        )
    try:
        result = EvalResult.model_validate({**content, "path": path})
        result.protocol_items  # noqa: B018 - computed and cached, to find out now whether it can be
    except RecursionError:
        raise InvalidResultError("damaged: its protocol is nested too deeply") from None
    except ValidationError as error:
        keys = ", ".join(sorted({".".join(map(str, mistake["loc"])) for mistake in error.errors()}))
        raise InvalidResultError(f"damaged or edited by hand: check {keys}") from None
    return result


def read_predictions(result: EvalResult, suffix: str) -> Predictions | None:
    """Read the model's predictions for the metrics that end in `suffix`; None if they are missing or damaged."""
    if result.predictions_file is None:
        return None
    try:
        path = result.path.with_name(Path(result.predictions_file).name)
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["id"]) != result.id:  # of a later evaluation into the same file
                return None
            parts = [arrays[f"{result.score.name}{suffix}/{part}"].astype(np.int64) for part in Predictions._fields]
    except _DAMAGE:
        return None
    predictions = Predictions(*map(torch.from_numpy, parts))
    return predictions if {tuple(part.shape) for part in predictions} == {(len(predictions.indices),)} else None


def _writer(content: dict[str, Any]) -> str:
    """Return the program that wrote a result, with its version where the file names it."""
    package = content.get("package", content.get("tool"))
    version = package.get("version") if isinstance(package, dict) else None
    return f"ssl-vit {version}" if isinstance(version, str) else "another version of ssl-vit"


def is_result(path: Path, task: str | None = None) -> bool:
    """Return whether a file is a result, of any version, and of this task if one is given."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(content, dict)
        and {"task", "protocol_hash"} <= content.keys()
        and (task is None or content["task"] == task)
    )


def archive_previous_result(path: Path, result: EvalResult) -> None:
    """Move an existing result at `path` to `replaced/` unless it has the same model, protocol and images."""
    try:
        previous = json.loads(path.read_bytes())
        name = str(previous["id"])[:8]
        model = previous["model"]["sha256"] or previous["model"]["state_sha256"]
        identity = previous["protocol_hash"], model, previous["data"]["fingerprints"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or nothing worth keeping
        return
    if identity == (result.protocol_hash, result.model.identity, result.data.get("fingerprints")):
        return
    folder = path.parent / "replaced"
    folder.mkdir(exist_ok=True)
    for file in path.parent.glob(f"{glob.escape(path.stem)}.*"):
        file.replace(folder / f"{path.stem}-{name}{file.name.removeprefix(path.stem)}")
    log.warning(f"{path} contained a result of other settings, images or weights; moved it to {folder}")
