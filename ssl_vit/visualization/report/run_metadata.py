"""Metadata of a run (model, checkpoint, images, seed, versions), and its health warnings."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ssl_vit.config.methods import METHOD_CONFIGS
from ssl_vit.data.dataset import escape_path
from ssl_vit.evaluation.results import provenance
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.text import pluralize
from ssl_vit.visualization.report.report_data import HealthRow
from ssl_vit.visualization.report.run_reader import RunContent


def run_metadata(run: RunContent, command: str) -> dict[str, str]:
    """Return names and values, the most important first; unknown values are omitted.

    Args:
        run: The run.
        command: The command that makes the report.
    """
    start = run.value("checkpoint")  # of a fine-tuning
    method = str(run.value("method.name") or "") if start is None else f"fine-tuning of {escape_path(str(start))}"
    here, there = Path.cwd().resolve(), run.path.resolve()
    path = escape_path(there.relative_to(here) if there.is_relative_to(here) else run.path)
    model = {"checkpoint": run.problems["model"]} if run.loaded is None else _model_metadata(run.loaded, run.path)
    seed = run.value("seed")
    package, environment = provenance.package_info(), provenance.environment(best_device())
    changed = " with changes" if package["dirty"] else ""
    commit = "" if package["git"] is None else f", commit {package['git'][:10]}{changed}"
    metadata = {
        "run": path,
        "method": method,
        **model,
        "images learned from": _images(run),
        "length planned": _planned_length(run),
        "seed of the training": "" if seed is None else f"{seed} (one run)",
        "program": f"ssl-vit {package['version']}{commit}",
        "versions": ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "timm")),
        "device of this report": f"{environment['device']}, {pluralize(environment['threads'], 'thread')}",
        "report made": _format_time(datetime.now(UTC)),
        "made by": command,
    }
    return {name: value for name, value in metadata.items() if value}


def run_caption(run: RunContent) -> dict[str, str]:
    """Return a short summary of the run; unknown values are omitted."""
    method = str(run.value("method.name") or "")
    caption = {"method": METHOD_CONFIGS[method].title if method in METHOD_CONFIGS else method}
    if run.loaded is not None:
        backbone, config = run.loaded.backbone, run.loaded.backbone.config
        shape = f"{backbone.embed_dim} wide, {backbone.num_blocks} blocks"
        caption["model"] = f"ViT, {shape}, {config.img_size} px in patches of {config.patch_size}"
        if run.loaded.step is not None:
            caption["trained"] = f"{run.loaded.step:,} steps, epoch {run.loaded.epoch}"
        caption["saved"] = _last_saved(run.path).partition(" ")[0]
    number, described, _ = _images(run).partition(" in ")
    caption["images"] = number if described else "/".join(Path(number).parts[-2:])
    return {name: value for name, value in caption.items() if value}


def load_health_warnings(folder: Path) -> tuple[list[HealthRow], int]:
    """Load the health warnings of `health.jsonl`, and one more if steps were skipped; count the unreadable lines."""
    health, damaged = _read_lines(folder / "health.jsonl", ("name", "finding", "remedy"))
    warnings = [HealthRow(str(w["name"]), w["step"], str(w["finding"]), str(w["remedy"])) for w in health]
    skipped, also_damaged = _read_lines(folder / "skipped_steps.jsonl", ())
    if steps := sorted({entry["step"] for entry in skipped}):
        where = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
        count = f"{pluralize(len(steps), 'step')} {'was' if len(steps) == 1 else 'were'}"
        text = f"{count} skipped, {where}: the loss or a gradient was not finite"
        remedy = "skipped_steps.jsonl names their images; a lower method.optimizer.lr or trainer.precision=32-true"
        warnings.append(HealthRow("skipped-steps", steps[0], text, f"{remedy} may help."))
    return warnings, damaged + also_damaged


def _model_metadata(loaded: LoadedBackbone, run: Path) -> dict[str, str]:
    epoch = "" if loaded.epoch is None else f" (in epoch {loaded.epoch + 1})"
    reached = "" if loaded.step is None else f", after {loaded.step:,} steps{epoch}"
    return {
        "checkpoint": f"{loaded.source.removeprefix(f'{Path.cwd()}/')}{reached}",
        "model": f"{loaded.backbone.config.name}: {loaded.backbone.describe()}",
        "parameters": f"{sum(parameter.numel() for parameter in loaded.backbone.parameters()):,}",
        "checkpoint sha256": loaded.sha256 or "",
        "last saved": _last_saved(run),
    }


def _last_saved(run: Path) -> str:
    """Return when the newest file with weights was written."""
    files = [*run.glob("checkpoints/*.ckpt"), *run.glob("backbone.safetensors")]
    return _format_time(datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC))


def _images(run: RunContent) -> str:
    """Return the run's description of its images, else the folder that its config names."""
    try:
        about: dict[str, Any] = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
        return f"{about['text']}; fingerprint {about['fingerprint'][:16]}"
    except (OSError, ValueError, LookupError, TypeError):
        root = run.value("data.root")
        return "" if root is None else escape_path(str(root))


def _planned_length(run: RunContent) -> str:
    """Return the length in the config; steps have precedence over epochs."""
    steps, epochs, time = (run.value(f"trainer.max_{name}") for name in ("steps", "epochs", "time"))
    length = f"{steps} steps" if steps else f"{epochs} epochs"
    return "" if not (steps or epochs) else f"{length}, within {time}" if time else length


def _format_time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _read_lines(path: Path, keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], int]:
    """Read the entries that contain a step and these keys, and count the other lines."""
    entries, damaged = [], 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int) or any(key not in entry for key in keys):
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged += 1
            continue
        entries.append(entry)
    return entries, damaged
