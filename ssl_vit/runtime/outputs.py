"""Check that a command neither writes over its inputs nor replaces files that ssl-vit did not write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ssl_vit.runtime.atomic_io import write_json
from ssl_vit.runtime.errors import UserError

RECORD = ".ssl-vit-outputs"  # in each folder with outputs: the names of the files and folders that ssl-vit wrote, JSON


def check_outputs(paths: Iterable[Path], *, inputs: Mapping[str, Path | str | None], is_own: bool = False) -> None:
    """Check, before the work, that files and folders may be written.

    Args:
        paths: Files, or folders that will be filled.
        inputs: Files and folders that the command reads, by their keys.
        is_own: Whether existing files are known to be ssl-vit's.

    Raises:
        UserError: An output is an input, contains one or lies in one; or it exists, and ssl-vit did not write it; or
            its folder cannot be written to.
    """
    sources = {key: Path(given).resolve() for key, given in inputs.items() if given is not None}
    for path in paths:
        out = path.resolve()
        for key, source in sources.items():
            if source.exists() and (out == source or out.is_relative_to(source) or source.is_relative_to(out)):
                raise UserError(f"{path} would be written over {key}={inputs[key]}: choose another out=")
        if not is_own and _holds_something(path) and path.name not in _read_record(path.parent):
            raise UserError(f"{path} exists and is not of ssl-vit: choose another out=, or remove it")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not os.access(folder, os.W_OK) or not folder.is_dir():
            raise UserError(f"{path}: {folder} cannot be written to: choose another out=")


def record_outputs(paths: Iterable[Path]) -> None:
    """Create the folders of outputs and record that ssl-vit writes them, so that it may replace them later."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded = _read_record(path.parent)
        if path.name not in recorded:
            write_json(path.parent / RECORD, sorted(recorded | {path.name}))


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _read_record(folder: Path) -> set[str]:
    """Return the names that ssl-vit wrote into a folder."""
    try:
        return set(json.loads((folder / RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):  # none, or damaged
        return set()
