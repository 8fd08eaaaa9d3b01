"""Read the run directory of a report, and note what is missing or unreadable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssl_vit.data.dataset import escape_path
from ssl_vit.evaluation.features.extractor import on_best_device
from ssl_vit.evaluation.results.eval_result import EvalResult
from ssl_vit.evaluation.results.result_reader import find_results, read_result
from ssl_vit.models.checkpoint import LoadedBackbone, Weights, load_backbone
from ssl_vit.runtime.errors import UserError

TRACES = ("config.yaml", "metrics.csv", "backbone.safetensors", "checkpoints/*.ckpt")  # what makes a folder a run


class RunFolder(NamedTuple):
    """What a report is made of, but for what it draws from images."""

    path: Path
    config: dict[str, Any]  # empty where it cannot be read
    loaded: LoadedBackbone | None  # on the best device; None where it cannot be loaded
    records: list[EvalResult]  # of evaluations, then of attention
    problems: dict[str, str]  # what could not be read, by section of the report

    @property
    def model(self) -> LoadedBackbone:
        """The model.

        Raises:
            UserError: It cannot be loaded.
        """
        if self.loaded is None:
            raise UserError(f"It needs the model. {self.problems['model']}")
        return self.loaded

    def value(self, key: str) -> Any:  # noqa: ANN401 - any YAML
        """Return the value of a dotted key in the run's config; None if it has no such key."""
        found: Any = self.config
        for name in key.split("."):
            if not isinstance(found, dict) or name not in found:
                return None
            found = found[name]
        return found


def open_run(path: Path, weights: Weights) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: There is no such folder, or nothing in it that a run leaves behind.
    """
    if not path.is_dir():
        what = "is a file; name the run folder" if path.exists() else "does not exist"
        raise UserError(f"run={escape_path(path)} {what}")
    if not any(any(path.glob(trace)) for trace in TRACES):
        raise UserError(f"run={escape_path(path)} is no run: it holds none of {', '.join(TRACES)}")
    problems: dict[str, str] = {}
    config = _config(path, problems)
    loaded = None
    try:
        loaded = on_best_device(load_backbone(str(path), weights, require_cls=False))
    except UserError as error:
        problems["model"] = str(error)
    return RunFolder(path, config, loaded, _records(path, problems), problems)


def _config(path: Path, problems: dict[str, str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems["config"] = "The run has no config.yaml."
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        problems["config"] = "config.yaml cannot be read: it is damaged."
        return {}
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))  # YAML also knows dates and sets
    return plain


def _records(path: Path, problems: dict[str, str]) -> list[EvalResult]:
    """All records that can be read; what is wrong with the others goes to `problems`."""
    records: list[EvalResult] = []
    left_out: list[str] = []
    if any((path / "eval").glob("*.json")):
        try:
            found = find_results([path / "eval"])
            records, left_out = found.results, found.skipped
        except UserError as error:
            left_out = str(error).splitlines()[1:]
    for file in sorted(path.glob("*/summary.json")):
        try:
            records.append(read_result(file))
        except ValueError as error:
            left_out.append(f"{file}: {error}")
    if left_out:
        problems["headlines"] = "Left out: " + "; ".join(line.strip() for line in left_out) + "."
    return records
