"""Read the run directory of a report, and note what is missing or unreadable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ssl_vit.data.dataset import escape_path
from ssl_vit.evaluation.features.extractor import on_best_device
from ssl_vit.evaluation.results.eval_result import EvalResult
from ssl_vit.evaluation.results.result_reader import find_results, read_result
from ssl_vit.models.checkpoint import LoadedBackbone, Weights, load_backbone
from ssl_vit.runtime.atomic_io import replaced_run_hint
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.yaml_file import read_yaml

TRACES = ("config.yaml", "metrics.csv", "backbone.safetensors", "checkpoints/*.ckpt")  # one of them makes it a run


class RunContent(NamedTuple):
    """What is read from a run directory before anything is computed."""

    path: Path
    config: dict[str, Any]  # empty if unreadable
    loaded: LoadedBackbone | None  # on the best device; None if it cannot be loaded
    results: list[EvalResult]  # by date
    problems: dict[str, str]  # what cannot be read: config, model, results

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


def check_run(path: Path) -> None:
    """Check that a folder is a run directory.

    Raises:
        UserError: There is no such folder, or nothing in it that a run writes.
    """
    if not path.is_dir():
        what = "is a file; name the run folder" if path.exists() else "does not exist"
        raise UserError(f"run={escape_path(path)} {what}{replaced_run_hint(path)}")
    if not any(any(path.glob(trace)) for trace in TRACES):
        hint = replaced_run_hint(path)
        raise UserError(f"run={escape_path(path)} is no run: it holds none of {', '.join(TRACES)}{hint}")


def read_run(path: Path, weights: Weights) -> RunContent:
    """Read config, model and results of a run directory."""
    problems: dict[str, str] = {}
    config = _read_config(path / "config.yaml", problems)
    loaded = None
    try:
        loaded = on_best_device(load_backbone(str(path), weights, require_cls=False))
    except UserError as error:
        problems["model"] = str(error)
    return RunContent(path, config, loaded, _read_results(path, problems), problems)


def _read_config(path: Path, problems: dict[str, str]) -> dict[str, Any]:
    try:
        # YAML also knows dates and sets.
        plain: Any = json.loads(json.dumps(read_yaml(path), default=str, skipkeys=True))
    except FileNotFoundError:
        problems["config"] = "The run has no config.yaml."
        return {}
    except (OSError, ValueError):
        plain = None
    if not isinstance(plain, dict):
        problems["config"] = "config.yaml cannot be read: it is damaged."
        return {}
    return plain


def _read_results(path: Path, problems: dict[str, str]) -> list[EvalResult]:
    """Return the results in `eval/`, and those in a folder of their own (summary.json) anywhere in the run."""
    results: list[EvalResult] = []
    skipped: list[str] = []
    if any((path / "eval").glob("*.json")):
        try:
            results, skipped = find_results([path / "eval"])
        except UserError as error:
            skipped = str(error).splitlines()[1:]
    for file in sorted(set(path.rglob("summary.json")) - {path / "eval" / "summary.json"}):
        try:
            results.append(read_result(file))
        except ValueError as error:
            skipped.append(f"{file}: {error}")
    if skipped:
        problems["results"] = "Left out: " + "; ".join(line.strip() for line in skipped) + "."
    return sorted(results, key=lambda result: result.created)
