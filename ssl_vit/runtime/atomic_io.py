"""Atomic file writes: a file is complete or absent, even if the process or the machine stops during the write."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends, synced to disk.

    If the block fails, `path` is unchanged. Only one process at a time may write a file.

    Raises:
        OSError: The disk is full, or `path` cannot be written to or is not a regular file.
    """
    if path.exists() and not path.is_file():  # /dev/null, for example
        raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write has none
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write plain containers as a JSON file, atomically.

    Raises:
        OSError: The disk is full, or `path` cannot be written to.
    """
    with atomic_write(path) as file:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        file.write(text.encode("utf-8", "backslashreplace"))  # undecodable bytes of file names


def fsync_dir(folder: Path) -> None:
    """Sync a directory to disk; a new or renamed file is not durable before."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
