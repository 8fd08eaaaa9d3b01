"""A process among others: which of several it is, what asks it to stop, and what it does with freed memory."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# What asks a run to stop: Ctrl-C, SIGTERM, and the warnings of SLURM and submitit before the time of a job is up.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if os.name == "posix":
    STOP_SIGNALS += [signal.SIGUSR1, signal.SIGUSR2]


def is_rank_zero() -> bool:
    """Whether this is the process that writes files and speaks for all.

    Lightning and torchrun tell a process its place through the environment; the first that Lightning starts has none.
    """
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def torchrun_rank() -> tuple[int, int]:
    """This process's number and how many torchrun started; (0, 1) where it did not."""
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's mallopt
_LARGE = 32 << 20  # bytes: what glibc takes from the system at once, and gives back, at the latest
_GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def disable_malloc_trim() -> None:
    """Let the C library keep what one training step frees for the next, instead of giving it back to the system.

    Otherwise each page of a large tensor is faulted in and cleared anew in every step. Only glibc can be told.
    """
    if _GLIBC:
        _GLIBC.mallopt(_TRIM_THRESHOLD, -1)
        _GLIBC.mallopt(_MMAP_MAX, 0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """As `disable_malloc_trim`, for a block of code: behind it, large pieces of memory go back when they are freed."""
    disable_malloc_trim()
    try:
        yield
    finally:
        if _GLIBC:
            _GLIBC.mallopt(_MMAP_MAX, 65536)
            _GLIBC.mallopt(_MMAP_THRESHOLD, _LARGE)
            _GLIBC.mallopt(_TRIM_THRESHOLD, 2 * _LARGE)
        give_memory_back()


def give_memory_back() -> None:
    """Give to the system what was kept."""
    if _GLIBC:
        _GLIBC.malloc_trim(0)
