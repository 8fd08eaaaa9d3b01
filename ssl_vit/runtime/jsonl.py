"""JSON lines log of a run, truncated to the checkpoint's step on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.launch import is_rank_zero


class JSONLWriter:
    """File of JSON lines, each with its optimizer `step` from 0; several processes may write to it.

    Args:
        path: Created with the first line.
        global_step: Number of optimizer steps that the run resumes after; lines of later steps are deleted.
    """

    def __init__(self, path: Path, global_step: int) -> None:
        self.path = path
        if is_rank_zero() and path.is_file():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step(line) < global_step]
            with atomic_write(path) as file:
                file.writelines(kept)

    def write(self, step: int, **entry: Any) -> None:
        """Append a line."""
        with FileLock(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Return all lines, parsed."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def _step(line: bytes) -> float:
    """Return the step of a line; infinity for a truncated one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return float("inf")
