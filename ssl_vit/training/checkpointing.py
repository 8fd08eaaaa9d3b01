"""Checkpoint files: written atomically, checked before use, with the previous one as a fallback."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from ssl_vit.models.checkpoint import LAST
from ssl_vit.models.official_checkpoints import torch_load_weights_only
from ssl_vit.runtime.atomic_io import atomic_write, fsync_dir
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.training.run_identity import MARKER, read_run_id

PREVIOUS = "previous.ckpt"
BEST = "best_knn.ckpt"  # never resumed from
RUN_ID = "ssl_vit_run"  # key of the run's id in a checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint writer, made atomic; the replaced checkpoint stays as `previous.ckpt`.

    A full disk is remembered instead of raised: with several processes the others would wait for the failed one.
    """

    failure: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: object | None = None
    ) -> None:
        try:
            with atomic_write(Path(path)) as file:
                torch.save(checkpoint | {RUN_ID: read_run_id(Path(path).parent.parent)}, file)
                if Path(path).exists():
                    link_checkpoint(Path(path), PREVIOUS)
        except (OSError, RuntimeError) as error:  # torch's writer wraps what the file raises
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            self.failure = cause


def link_checkpoint(path: Path, name: str) -> None:
    """Give a checkpoint a second name in its folder, which survives the replacement of the first."""
    temporary = path.with_name(f".{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    temporary.replace(path.with_name(name))
    temporary.unlink(missing_ok=True)  # it remains if both names already are links to one file
    fsync_dir(path.parent)


class LatestCheckpoint(NamedTuple):
    """The newest intact checkpoint."""

    path: Path
    step: int  # optimizer steps done
    damaged: list[Path]  # newer ones that cannot be read


_REPLACE = "use run.overwrite=true to replace the run, or another run.name"


def find_latest_checkpoint(folder: Path, *, otherwise: str = _REPLACE) -> LatestCheckpoint | None:
    """Return the newest intact checkpoint of a run, or None where none was written; `otherwise` is for the message.

    Raises:
        UserError: There are checkpoints, and all of them are damaged; or the newest is that of another run.
    """
    kept = sorted(folder.glob("epoch_*.ckpt"), reverse=True)
    candidates = [path for path in (folder / LAST, folder / PREVIOUS, *kept) if path.is_file()]
    damaged: list[Path] = []
    for path in candidates:
        if (header := _read_header(path)) is not None:
            _check_run_id(path, header.run_id)
            return LatestCheckpoint(path, header.step, damaged)
        damaged.append(path)
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged: {', '.join(path.name for path in damaged)}. Restore one of them "
            f"to resume, or {otherwise}"
        )
    return None


def resume_point(folder: Path, *, otherwise: str = _REPLACE) -> tuple[LatestCheckpoint | None, list[str]]:
    """Return the checkpoint to resume from, with notes on what is missing; damaged ones are renamed.

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    found = find_latest_checkpoint(folder, otherwise=otherwise)
    if found is None:
        return None, []
    notes = []
    if found.path.name != LAST and not found.damaged:
        notes.append(f"{LAST} is missing: resuming from {found.path.name}")
    for path in found.damaged:
        notes.append(f"{path} is damaged: resuming from the checkpoint before it")
        if is_rank_zero():  # otherwise it would become previous.ckpt
            path.replace(path.with_name(f"{path.name}.damaged"))
    return found, notes


def read_global_step(path: Path) -> int | None:
    """Return the number of optimizer steps in a checkpoint of this run; None if it cannot be read or is another's."""
    header = _read_header(path)
    return header.step if header and header.run_id in (None, read_run_id(path.parent.parent)) else None


class _Header(NamedTuple):
    step: int
    run_id: str | None  # None: written before checkpoints had one


def _check_run_id(path: Path, run_id: str | None) -> None:
    folder = path.parent.parent
    own = read_run_id(folder)
    if run_id is not None and run_id != own:
        raise UserError(
            f"{path} belongs to another run (id {run_id[:8]}; {folder / MARKER} "
            f"{f'has {own[:8]}' if own else 'is missing'}). Put the run's own files back to resume it"
        )


def _read_header(path: Path) -> _Header | None:
    try:
        content = torch_load_weights_only(path)
        run_id = content.get(RUN_ID)
        return _Header(int(content["global_step"]), run_id if isinstance(run_id, str) else None)
    except (UserError, LookupError, TypeError, ValueError):
        return None
