"""Files that survive a stop of the process or machine: atomic writes, and logs of JSON lines synced line by line."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import is_rank_zero

NO_LOCKS_ERRNOS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP})
READ_ONLY_ERRNOS = NO_LOCKS_ERRNOS | {errno.EROFS}
DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

log = logging.getLogger(__name__)


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


@contextmanager
def lock_file(path: Path, *, waiting: str = "") -> Iterator[None]:
    """Hold a lock file; while another process holds it, wait and log a warning, if one is given.

    The lock is released when its process ends, however it ends. The same thread may take it again.

    Raises:
        UserError: The file system has no locks.
    """
    lock = FileLock(path, is_singleton=True)
    try:
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            if waiting:
                log.warning(waiting)
            held = lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS_ERRNOS:
            raise
        raise UserError(
            f"{path.parent}: this file system has no file locks ({error.strerror}); use a folder on another disk"
        ) from None
    with held:
        yield


def write_json(path: Path, content: object) -> None:
    """Write plain containers as a JSON file with `atomic_write`."""
    with atomic_write(path) as file:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        file.write(text.encode("utf-8", "backslashreplace"))  # undecodable bytes of file names


def append_json(path: Path, content: object) -> None:
    """Append a line of JSON; a line that was cut off before stays a line of its own."""
    line = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
    with path.open("a+b", buffering=0) as file:  # one write, so that lines of two processes do not mix
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def fsync_dir(folder: Path) -> None:
    """Sync a directory to disk; a new or renamed file is not durable before."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replaced_run_path(real_path: Path) -> Path:
    """Return where `run.overwrite=true` keeps the old run until the new one has begun."""
    return real_path.with_name(f".{real_path.name}.replaced")


def replaced_run_hint(path: Path) -> str:
    """Return where the old run lies if a command that was to replace it was killed; empty otherwise."""
    old = replaced_run_path(Path(os.path.realpath(path)))
    if not old.is_dir():
        return ""
    return f"; the command that was to replace this run was killed, and the old run is kept in {old}: move it back"


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
        with lock_file(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _step(line: bytes) -> float:
    """Return the step of a line; infinity for a truncated one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return float("inf")
