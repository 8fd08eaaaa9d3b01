"""Check that a command neither writes over its inputs nor replaces files that ssl-vit did not write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ssl_vit.runtime.atomic_io import write_json
from ssl_vit.runtime.errors import UserError

RUN_MARKER = "run_id.txt"  # in each run directory, with a text that begins with RUN_MARKER_TEXT
RUN_MARKER_TEXT = "ssl-vit run "
RECORD = ".ssl-vit-outputs"  # in each folder with outputs, JSON: the command that wrote each file or folder, by name


def check_outputs(
    paths: Iterable[Path], command: str, *, inputs: Mapping[str, Path | str | None], is_own: bool = False
) -> None:
    """Check, before the work, that files and folders may be written.

    Args:
        paths: Files, or folders that will be filled.
        command: The command that writes them; it does not replace what another command wrote.
        inputs: Files and folders that the command reads, by their keys.
        is_own: Whether existing files are known to be of this command, or may be replaced.

    Raises:
        UserError: An output is an input, contains one or lies in one; or it exists, and this command did not write it;
            or its folder cannot be written to.
    """
    sources = {key: Path(given).resolve() for key, given in inputs.items() if given is not None}
    for path in paths:
        out = path.resolve()
        for key, source in sources.items():
            if source.exists() and (out == source or out.is_relative_to(source) or source.is_relative_to(out)):
                raise UserError(f"{path} would be written over {key}={inputs[key]}: choose another out=")
        owner = _read_record(path.parent).get(path.name)
        if not is_own and _holds_something(path) and owner != command:
            found = f"was written by `ssl-vit {owner}`" if owner else "is not of ssl-vit"
            raise UserError(f"{path} exists and {found}: choose another out=, or remove it")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not os.access(folder, os.W_OK) or not folder.is_dir():
            raise UserError(f"{path}: {folder} cannot be written to: choose another out=")


def record_outputs(paths: Iterable[Path], command: str) -> None:
    """Create the folders of outputs and record that a command writes them, so that it may replace them later."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded = _read_record(path.parent)
        if recorded.get(path.name) != command:
            write_json(path.parent / RECORD, recorded | {path.name: command})


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _read_record(folder: Path) -> dict[str, str]:
    """Return the commands that wrote into a folder, by the names of files."""
    try:
        return {str(name): str(command) for name, command in json.loads((folder / RECORD).read_bytes()).items()}
    except (OSError, ValueError, AttributeError):  # none, or damaged
        return {}
