"""Checks before a run is resumed: its config and its images are compared with those of now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ssl_vit.config.evaluate import FinetuneConfig
from ssl_vit.config.pretrain import PretrainConfig, RunConfig
from ssl_vit.data.dataset import ImageDataset, escape_path
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.runtime.errors import UserError

CONFIG = "config.yaml"
DATA = "data.json"  # number of images and their fingerprint
IMAGES = "image_list.safetensors"  # their paths, where they are files
LENGTH = {"max_epochs", "max_steps"}

# Keys that may differ on resume without changing what the run computes. The fingerprint shows whether data.root
# holds the same images; for fine-tuning, finetune_source compares the splits.
KEYS_ALLOWED_TO_CHANGE = (
    "run.",
    "data.root",
    "data.train",
    "data.test",
    "data.num_workers",
    "trainer.max_time",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.fused_attention",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every",
    "trainer.keep_every_epochs",
    "trainer.max_skipped_steps",
    "logger.",
    "online.",
    "image_logging.",
    "figure",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config that the run in a directory was started with.

    Raises:
        UserError: It is damaged.
    """
    try:
        values: dict[str, Any] = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if not values["trainer"].keys() >= LENGTH:
            raise ValueError("no config of a run")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        raise UserError(
            f"{folder / CONFIG} is damaged. Restore the file of the run; `ssl-vit ... --cfg` prints the config of a "
            "command"
        ) from None
    return values


def check_version(folder: Path, values: dict[str, Any]) -> None:
    """Refuse to resume a run of version 0.1, whose config has other keys.

    Raises:
        UserError: `values` is the config of such a run.
    """
    if "accumulate" in values["trainer"]:  # today accumulate_grad_batches
        raise UserError(
            f"{folder} is a run of ssl-vit 0.1, which this version cannot resume. Finish it with ssl-vit 0.1, or start "
            f"a new run with another run.name. Its weights can be evaluated and exported: checkpoint={folder}"
        )


def compare_configs(before: dict[str, Any], now: PretrainConfig | FinetuneConfig) -> list[str]:
    """Return a line for each allowed difference between the config of a run and the one that resumes it.

    Keys that only one of them has are ignored, as they come from another version.

    Raises:
        UserError: Listing every key that would change what the run computes.
    """
    old, new = _flatten(before), _flatten(now.model_dump(mode="json"))
    changed = {key: f"{key}: {old[key]} -> {new[key]}" for key in old if key in new and old[key] != new[key]}
    length = {f"trainer.{key}" for key in LENGTH}
    extended = now.run.extend_to_epochs is not None
    refused = [
        text
        for key, text in changed.items()
        if not (key.startswith(KEYS_ALLOWED_TO_CHANGE) or (extended and key in length))
        or (now.depends_on_num_processes and key in ("trainer.devices", "trainer.num_nodes"))
    ]
    if refused:
        head = "run.resume=true: these keys differ from the run's config.yaml. Set them back"
        epochs = before["trainer"]["max_epochs"]
        was_extended = before["trainer"]["max_steps"] is None and (
            epochs > now.trainer.max_epochs or now.trainer.max_steps is not None
        )
        option = f"run.extend_to_epochs={epochs} resumes it" if was_extended else "run.extend_to_epochs=N extends a run"
        hint = [f"({option})"] if length & changed.keys() and not extended else []
        raise UserError("\n  ".join([head, *refused, *hint]))
    return [f"Changed: {text}" for key, text in changed.items() if not key.startswith("run.")]


def check_dataset_unchanged(run: RunConfig, found: ImageDataset) -> tuple[ImageDataset, list[str]]:
    """Return the dataset to resume with, and notes about it.

    Raises:
        UserError: The images are not those of the run, and run.keep_image_list is false.
    """
    try:
        before = json.loads((run.path / DATA).read_text(encoding="utf-8"))
        unchanged = found.fingerprint(sizes=False) == before["fingerprint"]
        head = f"run.resume=true: the images have changed, from {before['count']:,} to {len(found):,}"
        dataset_text = f"The run was started with {before['text']}"
    except (OSError, ValueError, LookupError, TypeError):
        return found, [f"{run.path / DATA} cannot be read: the images could not be compared with those of the run"]
    if unchanged:
        return found, []
    try:
        names = PackedPaths.load(run.path / IMAGES)
    except (OSError, ValueError):
        names = None
    if names is None or not isinstance(found, ImageFolder):
        raise UserError(f"{head}. {dataset_text}. Use the same images, or another run.name")
    old, new = set(names), set(found.names)
    difference = f"removed: {_abbreviate(old - new)}; new: {_abbreviate(new - old)}"
    if not run.keep_image_list:
        raise UserError(
            f"{head}. {difference}. Restore the folder, or use run.keep_image_list=true to resume with the list of the "
            "run: removed images are skipped and counted, new ones ignored"
        )
    return found.with_names(names), [f"The images have changed ({difference}); the run keeps its own list"]


def _abbreviate(names: set[bytes], most: int = 3) -> str:
    """Return `3 (a.jpg, b.jpg, ...)`."""
    if not names:
        return "none"
    shown = [escape_path(name) for name in sorted(names)[:most]] + (["..."] if len(names) > most else [])
    return f"{len(names):,} ({', '.join(shown)})"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
