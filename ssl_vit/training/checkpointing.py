"""Checkpoints to trust: written whole, checked before use, and with the one before to fall back to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from ssl_vit.models.checkpoint_file import LAST, torch_load_weights_only
from ssl_vit.runtime.atomic_io import atomic_write, fsync_dir
from ssl_vit.runtime.errors import UserError

PREVIOUS = "previous.ckpt"
BEST = "best_knn.ckpt"  # never one to go on from


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way of writing checkpoints, with a file that is on the disk whole before it takes its name.

    The checkpoint that it replaces stays in the folder as `previous.ckpt`. A full disk is remembered and not raised:
    under several processes the others would wait for the one that failed.
    """

    failure: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: object | None = None
    ) -> None:
        try:
            with atomic_write(Path(path)) as file:
                torch.save(checkpoint, file)
                if Path(path).exists():
                    link_checkpoint(Path(path), PREVIOUS)
        except (OSError, RuntimeError) as error:  # torch's writer turns what the file raises into its own
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            self.failure = cause


def link_checkpoint(path: Path, name: str) -> None:
    """Give a checkpoint a second name in its folder, which outlives the replacement of the first."""
    temporary = path.with_name(f".{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    temporary.replace(path.with_name(name))
    temporary.unlink(missing_ok=True)  # it stays where both names are of one file already
    fsync_dir(path.parent)


class Found(NamedTuple):
    """The newest checkpoint that can be trusted."""

    path: Path
    step: int  # optimizer steps done
    damaged: list[Path]  # newer ones, which cannot be read


def find_latest_checkpoint(folder: Path) -> Found | None:
    """The newest whole checkpoint of a run, or None where nothing has been saved yet.

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    kept = sorted(folder.glob("epoch_*.ckpt"), reverse=True)
    candidates = [path for path in (folder / LAST, folder / PREVIOUS, *kept) if path.is_file()]
    damaged: list[Path] = []
    for path in candidates:
        if (step := read_global_step(path)) is not None:
            return Found(path, step, damaged)
        damaged.append(path)
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged: {', '.join(path.name for path in damaged)}. Put a good one back "
            "to go on; run.overwrite=true starts anew, run.name=OTHER starts beside it"
        )
    return None


def read_global_step(path: Path) -> int | None:
    """Optimizer steps done when the checkpoint was written; None if it is not as it was written."""
    try:
        return int(torch_load_weights_only(path)["global_step"])
    except (UserError, LookupError, TypeError, ValueError):
        return None
