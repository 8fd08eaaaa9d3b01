"""Files that are there whole or not at all, whatever happens to the process or the machine while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, that takes the place of `path` when the block ends, and is on the disk by then.

    Should the block fail, by a full disk say, `path` stays as it was. One process may write a file at a time.

    Raises:
        OSError: The disk is full, or `path` cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of files onto the disk: a new name is not safe before."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
