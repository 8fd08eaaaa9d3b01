"""What a fine-tuning comes from, which may not change underway: its first model, what it learns from and tests on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, Subset
from ssl_vit.models.backbone import state_sha256
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.atomic_io import write_json
from ssl_vit.runtime.errors import UserError

ORIGIN = "origin.json"


def finetune_source(
    loaded: LoadedBackbone, learned: Subset, held_out: Subset, test: ImageDataset
) -> dict[str, dict[str, Any]]:
    """The model's weights and how far they were trained, and hashes of the three datasets with their sizes.

    Args:
        loaded: The model that the fine-tuning begins with.
        learned: Some of the training images.
        held_out: Others of them.
        test: Others still, or a set of their own, whose names and file sizes then count.
    """
    tested = _hash(test.indices) if isinstance(test, Subset) else test.fingerprint(sizes=True)
    return {
        "model": {
            "sha256": state_sha256(loaded.backbone.state_dict()),
            "epoch": loaded.epoch,
            "step": loaded.step,
        },
        "division": {
            "learned": {"count": len(learned), "hash": _hash(learned.indices)},
            "held_out": {"count": len(held_out), "hash": _hash(held_out.indices)},
            "tested": {"count": len(test), "hash": tested},
        },
    }


def keep_origin(folder: Path, now: dict[str, dict[str, Any]]) -> None:
    """Write down what a run that begins now comes from."""
    write_json(folder / ORIGIN, now)


def compare_origin(folder: Path, now: dict[str, dict[str, Any]]) -> list[str]:
    """What to say of a run that is about to go on, if it comes from the same as when it began.

    Raises:
        UserError: It would go on with other images, or name a model that it did not begin with.
    """
    try:
        before = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        division, model = _division(before["division"]), _model(before["model"])
    except (OSError, ValueError, LookupError, TypeError):
        return [f"{folder / ORIGIN} cannot be read: whether model and test images are the same is not known"]
    if before["division"] != now["division"]:
        raise UserError(
            "run.resume=true: the images to learn from and to test on are not those that the run began with: "
            f"{division}; now {_division(now['division'])}. It could be tested on what it has learned from. Give it "
            "the same data.root, data.train, data.test and files, or start beside it with run.name=OTHER"
        )
    if before["model"] != now["model"]:
        raise UserError(
            "run.resume=true: checkpoint= holds another model than the one that the run began with: "
            f"{model}; now {_model(now['model'])}. Put that one back, or start anew from this one: "
            "run.overwrite=true deletes the run, run.name=OTHER starts beside it"
        )
    return []


def _hash(places: Tensor) -> str:
    return hashlib.sha256(places.numpy().tobytes()).hexdigest()


def _division(division: dict[str, Any]) -> str:
    """`150 learned, 20 held out, 48 tested (0a1b2c3d)`: equal numbers may be of other images."""
    counts = [f"{division[name]['count']:,} {name.replace('_', ' ')}" for name in ("learned", "held_out", "tested")]
    return f"{', '.join(counts)} ({division['tested']['hash'][:8]})"


def _model(model: dict[str, Any]) -> str:
    """`epoch 3, step 120, sha256 0a1b2c3d`."""
    known = [f"{name} {model[name]}" for name in ("epoch", "step") if model[name] is not None]
    return ", ".join([*known, f"sha256 {model['sha256'][:8]}"])
