"""The model and the data splits that a fine-tuning starts from; they must not change when it is resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, Subset
from ssl_vit.models.backbone import state_sha256
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.atomic_io import write_json
from ssl_vit.runtime.errors import UserError

SOURCE = "source.json"


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


def save_source(folder: Path, source: dict[str, dict[str, Any]]) -> None:
    """Write what a new run starts from."""
    write_json(folder / SOURCE, source)


def check_source_unchanged(folder: Path, now: dict[str, dict[str, Any]]) -> list[str]:
    """Return notes about a run that is resumed from the same model and splits.

    Raises:
        UserError: The images or the model are others than those of the run.
    """
    try:
        before = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        splits, model = _format_splits(before["splits"]), _format_model(before["model"])
    except (OSError, ValueError, LookupError, TypeError):
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
