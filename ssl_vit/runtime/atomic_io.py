"""Files that are there whole or not at all, whatever happens to the process or the machine while they are written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # what a disk says that takes no more


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, that takes the place of `path` when the block ends, and is on the disk by then.

    Should the block fail, by a full disk say, `path` stays as it was. One process may write a file at a time.

    Raises:
        OSError: The disk is full, or `path` cannot be written to or is no file that could be replaced.
    """
    if path.exists() and not path.is_file():  # /dev/null, say
        raise FileExistsError(errno.EEXIST, "this is no file", str(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write plain containers as a JSON file; no reader ever sees half of it.

    Raises:
        OSError: The disk is full, or `path` cannot be written to.
    """
    with atomic_write(path) as file:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        file.write(text.encode("utf-8", "backslashreplace"))  # of a file name's odd bytes, JSON's own escape


def fsync_dir(folder: Path) -> None:
    """Bring the folder's list of files onto the disk: a new name is not safe before."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
