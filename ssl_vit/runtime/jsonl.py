"""What happens along a run, one line of JSON each, continued without double lines on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.launch import is_rank_zero


class JSONLWriter:
    """A file of JSON lines, each with the `step` that it belongs to (from 0); several processes may write to it.

    Args:
        path: The file; it appears with the first line.
        done: Optimizer steps that the run goes on from; lines of later steps are dropped.
    """

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        if is_rank_zero() and path.is_file():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step(line) < done]
            with atomic_write(path) as file:
                file.writelines(kept)

    def write(self, step: int, **entry: Any) -> None:
        """Add a line."""
        with FileLock(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def _step(line: bytes) -> float:
    """The step of a line; infinite for one that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return float("inf")
