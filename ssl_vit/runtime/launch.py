"""The process: its rank from the environment, the signals that stop it, and its use of freed memory; without torch."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Ctrl-C, SIGTERM, and the signals that SLURM and submitit send before a job's time limit.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if os.name == "posix":
    STOP_SIGNALS += [signal.SIGUSR1, signal.SIGUSR2]


def is_rank_zero() -> bool:
    """Return whether this process is the one that writes files and prints.

    Lightning and torchrun set the rank in the environment, except for the process that Lightning is started in.
    """
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def torchrun_rank() -> tuple[int, int]:
    """Return the rank and the world size that torchrun set; (0, 1) without torchrun."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "RANK" in os.environ else (0, 1)


def launched_processes() -> tuple[int, int] | None:
    """Return the processes per machine and the machines that torchrun, srun or alike started; None without a launcher.

    Not the processes that Lightning starts itself: these have no RANK.
    """
    if "RANK" in os.environ:
        world = _count("WORLD_SIZE")
        local = _count("LOCAL_WORLD_SIZE", world)
        return local, max(1, world // local)
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # there Lightning starts the processes
    if "SLURM_STEP_NUM_TASKS" in os.environ and not interactive:
        nodes = _count("SLURM_STEP_NUM_NODES", _count("SLURM_NNODES"))
        return max(1, _count("SLURM_STEP_NUM_TASKS") // nodes), nodes
    return None


def _count(variable: str, default: int = 1) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and int(text) else default


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's mallopt
_LARGE = 32 << 20  # bytes; glibc's upper limit of its dynamic mmap threshold
_GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def disable_malloc_trim() -> None:
    """Keep freed memory in the process instead of returning it to the system; with glibc only.

    Otherwise each page of a large tensor is faulted in and zeroed again in every training step.
    """
    if _GLIBC:
        _GLIBC.mallopt(_TRIM_THRESHOLD, -1)
        _GLIBC.mallopt(_MMAP_MAX, 0)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Apply `disable_malloc_trim` within the block; after it, large allocations are returned when freed."""
    disable_malloc_trim()
    try:
        yield
    finally:
        if _GLIBC:
            _GLIBC.mallopt(_MMAP_MAX, 65536)
            _GLIBC.mallopt(_MMAP_THRESHOLD, _LARGE)
            _GLIBC.mallopt(_TRIM_THRESHOLD, 2 * _LARGE)
        trim_malloc()


def trim_malloc() -> None:
    """Return freed memory to the system."""
    if _GLIBC:
        _GLIBC.malloc_trim(0)
