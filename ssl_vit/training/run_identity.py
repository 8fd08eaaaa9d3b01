"""The identity of a run: a marker with its id, which its checkpoints carry, and what may be deleted as a run."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import RUN_MARKER, RUN_MARKER_TEXT
from ssl_vit.runtime.yaml_file import read_yaml

MARKER = RUN_MARKER
_TEXT = re.compile(re.escape(RUN_MARKER_TEXT.encode()) + rb"([0-9a-f]{32})\n?")

# What a start that failed may leave behind, and the output of schedulers.
_LEFTOVERS = (
    ".*.lock", ".*.tmp", ".DS_Store", ".nfs*", "checkpoints", "wandb", "wandb_id.txt", "metrics.csv", "source.json",
    "start.safetensors", "start.json",
    "skipped_*", "health.jsonl", "data.json", "image_list.safetensors", "*.out", "*.err", "*.log",
)  # fmt: skip


def read_run_id(folder: Path) -> str | None:
    """Return the id of the run in a directory; None without a marker of this tool (of runs begun before 0.2.0, too)."""
    try:
        with (folder / MARKER).open("rb") as file:
            found = _TEXT.fullmatch(file.read(200))
    except OSError:
        return None
    return found[1].decode() if found else None


def mark_as_run(folder: Path) -> None:
    """Write the marker with a new id, unless there is one."""
    if read_run_id(folder) is None:
        with atomic_write(folder / MARKER) as file:
            file.write(f"{RUN_MARKER_TEXT}{uuid.uuid4().hex}\n".encode())


def check_deletable(folder: Path) -> None:
    """Check that this tool wrote a directory: it has the marker, or, as older runs, a run's config and its data.json.

    Raises:
        UserError: It did not, so that run.overwrite=true must not delete it.
    """
    if read_run_id(folder) is None and not _is_older_run(folder):
        raise UserError(
            f"run.overwrite=true: {folder} was not written by ssl-vit (it has no {MARKER}), so it is not deleted. "
            "Use another run.name, or move the folder away yourself"
        )


def check_startable(folder: Path) -> None:
    """Check that a new run does not mix with the files of others, which replacing the run would delete later.

    Raises:
        UserError: The directory contains such files, or is none.
    """
    if not folder.exists() or read_run_id(folder) is not None:
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file. Use another run.name")
    foreign = sorted(
        entry.name for entry in folder.iterdir() if not any(entry.match(pattern) for pattern in _LEFTOVERS)
    )
    if foreign:
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(f"{folder} contains files that are not of a run ({names}). Use another run.name")


def _is_older_run(folder: Path) -> bool:
    try:
        config: Any = read_yaml(folder / "config.yaml")
    except (OSError, ValueError):
        return False
    sections = {"run", "trainer", "data", "method"}
    return isinstance(config, dict) and sections <= config.keys() and (folder / "data.json").is_file()
