"""Checks before a run is resumed: config, images, and the source of a fine-tuning must be those of the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ssl_vit.config.evaluate import FinetuneConfig
from ssl_vit.config.pretrain import PretrainConfig, RunConfig
from ssl_vit.data.dataset import ImageDataset, Subset, escape_path, evenly_spaced
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.models.backbone import state_sha256
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.yaml_file import read_yaml

CONFIG = "config.yaml"
DATA = "data.json"  # number of images and their fingerprint
IMAGES = "image_list.safetensors"  # their paths, where they are files
SOURCE = "source.json"  # model and splits of a fine-tuning
_SIZES_COMPARED = 1000  # images
LENGTH = {"max_epochs", "max_steps"}

# Keys that may differ on resume without changing what the run computes. The fingerprint shows whether data.root
# holds the same images; for fine-tuning, check_source_unchanged compares the splits.
KEYS_ALLOWED_TO_CHANGE = (
    "run.", "logger.", "online.", "image_logging.", "figure",
    "data.root", "data.train", "data.test", "data.num_workers",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.max_time", "trainer.max_skipped_steps",
    "trainer.fused_attention", "trainer.compile", "trainer.activation_checkpointing",
    "trainer.log_every_n_steps", "trainer.checkpoint_every", "trainer.keep_every_epochs",
)  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config that the run in a directory was started with.

    Raises:
        UserError: It is damaged.
    """
    try:
        values: dict[str, Any] = read_yaml(folder / CONFIG)
        lengths = [values["trainer"][key] for key in sorted(LENGTH)]
        if not all(isinstance(length, int) and length > 0 for length in lengths if length is not None):
            raise ValueError(f"trainer.max_epochs and max_steps are {lengths}")
        if lengths[0] is None:
            raise ValueError("trainer.max_epochs is missing")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{folder / CONFIG} is damaged ({reason}). Restore the file of the run; `ssl-vit ... --cfg` prints "
            "the config of a command"
        ) from None
    return values


def compare_configs(before: dict[str, Any], now: PretrainConfig | FinetuneConfig) -> list[str]:
    """Return a line for each allowed difference between the config of a run and the one that resumes it.

    Keys that only one of them has are ignored, as they come from another version.

    Raises:
        UserError: Listing every key that would change what the run computes; or the run is one of version 0.1, whose
            config has other keys.
    """
    if "accumulate" in before["trainer"]:  # today accumulate_grad_batches
        raise UserError(
            f"{now.run.path} is a run of ssl-vit 0.1, which this version cannot resume. Finish it with ssl-vit 0.1, or "
            "start a new run with another run.name. Its weights can be evaluated and exported: "
            f"checkpoint={now.run.path}"
        )
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
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return found, [f"{run.path / DATA} cannot be read: the images could not be compared with those of the run"]
    if unchanged:
        if before.get("sizes") in (None, hash_sizes(found)):
            return found, []
        return found, ["Files have another size than at the start of the run: images were replaced under their names"]
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


def hash_sizes(dataset: ImageDataset) -> str | None:
    """Hash the bytes of up to 1,000 image files, evenly spaced; None for images that are no files of a folder."""
    if not isinstance(dataset, ImageFolder):
        return None
    rows = evenly_spaced(len(dataset), _SIZES_COMPARED).tolist()
    some = ImageFolder(dataset.root, PackedPaths.from_iterable(dataset.names[row] for row in rows))
    return some.fingerprint(sizes=True)


class Splits(NamedTuple):
    """The labeled images of a fine-tuning."""

    train: Subset
    val: Subset
    test: ImageDataset
    rule: str  # how the test images were chosen


def finetune_source(loaded: LoadedBackbone, splits: Splits) -> dict[str, dict[str, Any]]:
    """Return the hash and age of the model's weights, and the sizes and hashes of the splits.

    A test set of its own is hashed by its names and file sizes.
    """
    test = splits.test
    test_hash = _hash(test.indices) if isinstance(test, Subset) else test.fingerprint(sizes=True)
    return {
        "model": {
            "sha256": state_sha256(loaded.backbone.state_dict()),
            "epoch": loaded.epoch,
            "step": loaded.step,
        },
        "splits": {
            "train": {"count": len(splits.train), "hash": _hash(splits.train.indices)},
            "val": {"count": len(splits.val), "hash": _hash(splits.val.indices)},
            "test": {"count": len(test), "hash": test_hash},
        },
    }


def check_source_unchanged(folder: Path, now: dict[str, dict[str, Any]]) -> list[str]:
    """Return notes about a run that is resumed from the same model and splits.

    Raises:
        UserError: The images or the model are others than those of the run.
    """
    try:
        before = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        splits, model = _format_splits(before["splits"]), _format_model(before["model"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return [f"{folder / SOURCE} cannot be read: model and splits could not be compared with those of the run"]
    if before["splits"] != now["splits"]:
        raise UserError(
            "run.resume=true: the train, val or test images are not those of the run, which had "
            f"{splits}; now {_format_splits(now['splits'])}. It could be tested on images that it was trained on. Use "
            "the same data.root, data.train, data.test and files, or another run.name"
        )
    if before["model"] != now["model"]:
        raise UserError(
            "run.resume=true: checkpoint= contains another model than the one that the run started from: "
            f"{model}; now {_format_model(now['model'])}. Restore that file, or start from the new model with "
            "run.overwrite=true, which replaces the run, or another run.name"
        )
    return []


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


def _hash(indices: Tensor) -> str:
    return hashlib.sha256(indices.numpy().tobytes()).hexdigest()


def _format_splits(splits: dict[str, Any]) -> str:
    """Return `150 train, 20 val, 48 test (0a1b2c3d)`: equal counts may be of other images."""
    counts = [f"{splits[name]['count']:,} {name}" for name in ("train", "val", "test")]
    return f"{', '.join(counts)} ({splits['test']['hash'][:8]})"


def _format_model(model: dict[str, Any]) -> str:
    """Return `epoch 3, step 120, sha256 0a1b2c3d`."""
    age = [f"{name} {model[name]}" for name in ("epoch", "step") if model[name] is not None]
    return ", ".join([*age, f"sha256 {model['sha256'][:8]}"])
