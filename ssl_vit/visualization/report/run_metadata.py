"""Metadata of a run: model, checkpoint, images, seed, versions."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ssl_vit.config.methods import METHOD_CONFIGS
from ssl_vit.data.dataset import escape_path
from ssl_vit.evaluation.results import provenance
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.device import best_device
from ssl_vit.visualization.report.run_results import RunFolder
from ssl_vit.visualization.report.schema import HealthRow


def run_metadata(run: RunFolder, command: str) -> dict[str, str]:
    """Names and values, in the order in which a reader wants them.

    Args:
        run: The run.
        command: That makes the report.
    """
    start = run.value("checkpoint")  # of a fine-tuning
    method = str(run.value("method.name") or "") if start is None else f"fine-tuning of {escape_path(str(start))}"
    facts = {"run": _near(run.path), "method": method}
    if run.loaded is None:
        facts["checkpoint"] = run.problems["model"]
    else:
        facts |= _model(run.loaded, run)
    facts["images learned from"] = _images(run)
    facts["length planned"] = _length(run)
    seed = run.value("seed")
    facts["seed of the training"] = "" if seed is None else f"{seed} (one run)"
    tool, environment = provenance.package_info(), provenance.environment(best_device())
    commit = "" if tool["git"] is None else f", commit {tool['git'][:10]}{' with changes' if tool['dirty'] else ''}"
    facts["program"] = f"ssl-vit {tool['version']}{commit}"
    facts["versions"] = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "timm"))
    facts["device of this report"] = f"{environment['device']}, {_counted(environment['threads'], 'thread')}"
    facts["report made"] = _moment(datetime.now(UTC))
    facts["made by"] = command
    return {name: value for name, value in facts.items() if value}


def run_caption(run: RunFolder) -> dict[str, str]:
    """Return a short summary of the run; unknown values are omitted."""
    method = str(run.value("method.name") or "")
    essentials = {"method": METHOD_CONFIGS[method].title if method in METHOD_CONFIGS else method}
    if run.loaded is not None:
        backbone, config = run.loaded.backbone, run.loaded.backbone.config
        shape = f"{backbone.embed_dim} wide, {backbone.num_blocks} blocks"
        essentials["model"] = f"ViT, {shape}, {config.img_size} px in patches of {config.patch_size}"
        if run.loaded.step is not None:
            essentials["trained"] = f"{run.loaded.step:,} steps, epoch {run.loaded.epoch}"
        essentials["saved"] = _moment(datetime.fromtimestamp(_newest(run), UTC)).partition(" ")[0]
    number, described, _ = _images(run).partition(" in ")
    essentials["images"] = number if described else "/".join(Path(number).parts[-2:])
    return {name: value for name, value in essentials.items() if value}


def _near(path: Path) -> str:
    """Return a path relative to the current folder if it is inside."""
    here, there = Path.cwd().resolve(), path.resolve()
    return escape_path(there.relative_to(here) if there.is_relative_to(here) else path)


def _model(loaded: LoadedBackbone, run: RunFolder) -> dict[str, str]:
    params = sum(parameter.numel() for parameter in loaded.backbone.parameters())
    epoch = "" if loaded.epoch is None else f" (in epoch {loaded.epoch + 1})"
    reached = "" if loaded.step is None else f", after {loaded.step:,} steps{epoch}"
    trained = datetime.fromtimestamp(_newest(run), UTC)
    here = f"{Path.cwd()}/"
    return {
        "model": f"{loaded.backbone.config.name}: {loaded.backbone.describe()}",
        "parameters": f"{params:,}",
        "checkpoint": f"{loaded.source.removeprefix(here)}{reached}",
        "checkpoint sha256": loaded.sha256 or "",
        "last saved": _moment(trained),
    }


def _newest(run: RunFolder) -> float:
    """When the newest file with weights was written, in seconds."""
    files = [*run.path.glob("checkpoints/*.ckpt"), *run.path.glob("backbone.safetensors")]
    return max(file.stat().st_mtime for file in files)


def _images(run: RunFolder) -> str:
    """Return the run's description of its images, else the folder that its config names."""
    try:
        about: dict[str, Any] = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
        return f"{about['text']}; fingerprint {about['fingerprint'][:16]}"
    except (OSError, ValueError, LookupError, TypeError):
        root = run.value("data.root")
        return "" if root is None else escape_path(str(root))


def _length(run: RunFolder) -> str:
    """As the configuration says it: steps, where it names them, rule out epochs."""
    steps, epochs, time = (run.value(f"trainer.max_{name}") for name in ("steps", "epochs", "time"))
    length = f"{steps} steps" if steps else f"{epochs} epochs"
    return "" if not (steps or epochs) else f"{length}, within {time}" if time else length


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _moment(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


class Journals(NamedTuple):
    """The verdicts, and how many lines of the journals could not be read."""

    verdicts: list[HealthRow]
    damaged: int


def load_health_warnings(folder: Path) -> Journals:
    """Load the health warnings of `health.jsonl`, and one more if steps were skipped."""
    health, damaged = _lines(folder / "health.jsonl", ("name", "finding", "remedy"))
    verdicts = [HealthRow(str(v["name"]), v["step"], str(v["finding"]), str(v["remedy"])) for v in health]
    skipped, more = _lines(folder / "skipped_steps.jsonl", ())
    if steps := sorted({entry["step"] for entry in skipped}):
        where = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
        count = "1 step was" if len(steps) == 1 else f"{len(steps):,} steps were"
        text = f"{count} skipped, {where}: the loss or a gradient was not finite"
        remedy = "skipped_steps.jsonl names their images; a lower method.optimizer.lr or trainer.precision=32-true"
        verdicts.append(HealthRow("skipped-steps", steps[0], text, f"{remedy} may help."))
    return Journals(verdicts, damaged + more)


def _lines(path: Path, keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], int]:
    """Read the entries that contain a step and these keys, and count the other lines."""
    if not path.is_file():
        return [], 0
    entries, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int) or any(key not in entry for key in keys):
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged += 1
            continue
        entries.append(entry)
    return entries, damaged
