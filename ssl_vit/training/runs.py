"""A run is its folder: opening it, going on in it, and what a changed configuration means for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from ssl_vit.config import PretrainConfig, RunConfig
from ssl_vit.errors import UserError
from ssl_vit.models.weights import read_plain

CONFIG = "config.yaml"

# Keys that may differ on resume without changing what the run computes.
HARMLESS = (
    "run.",
    "data.workers",
    "data.memory_gb",
    "trainer.max_time",
    "trainer.devices",
    "trainer.nodes",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.keep_every_epochs",
    "logger.",
    "online_knn.",
)


def open_run(config: PretrainConfig, *, first_process: bool) -> Path | None:
    """Make the run folder, or go on in it; returns the checkpoint to go on from.

    Processes other than the first change nothing.

    Raises:
        UserError: The folder holds a run already, there is nothing to resume, or the configuration has changed.
    """
    folder = config.run.path
    last = folder / "checkpoints" / "last.ckpt"
    if config.run.resume:
        for needed in (last, folder / CONFIG):
            if not needed.is_file():
                raise UserError(f"run.resume=true: {needed} does not exist; start the run without it")
        refuse_changes(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")), config)
        return last
    if first_process:
        claim_folder(config.run)
        last.parent.mkdir(parents=True, exist_ok=True)
    return None


def begin_run(config: PretrainConfig) -> None:
    """Write config.yaml: from here on the folder holds a run, which nothing overwrites unasked."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (config.run.path / CONFIG).write_text(text, encoding="utf-8")


def claim_folder(run: RunConfig) -> None:
    """See to it that the run folder holds no run; one that may be overwritten is deleted.

    Raises:
        UserError: It holds a run that may not be overwritten.
    """
    if (run.path / CONFIG).exists():
        if not run.overwrite:
            raise UserError(
                f"{run.path} holds a run already. Three ways on: run.resume=true continues it, run.overwrite=true "
                "deletes it and starts anew, run.name=OTHER starts beside it"
            )
        shutil.rmtree(run.path)


def steps_done(checkpoint: Path | None) -> int:
    """Optimizer steps done when the checkpoint was written; 0 without one.

    Raises:
        UserError: The file is damaged.
    """
    if checkpoint is None:
        return 0
    return int(read_plain(checkpoint)["global_step"])


def refuse_changes(before: dict[str, Any], config: PretrainConfig) -> None:
    """Compare the configuration of a run with the one that would continue it.

    Raises:
        UserError: Listing every key that would change the meaning of the run.
    """
    old, new = _flat(before), _flat(config.model_dump(mode="json"))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    harmful = [key for key in changed if not key.startswith(HARMLESS)]
    if harmful:
        lines = [f"  {key}: {old.get(key)} -> {new.get(key)}" for key in harmful]
        raise UserError(
            "\n".join(["run.resume=true: these keys differ from the run's config.yaml; set them back", *lines])
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
