"""The CPU cores of this process, and maps over threads and processes."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from tqdm import tqdm

from ssl_vit.runtime.progress import progress_bar

MAX_WORKERS = 16  # with more, the disk and the main process are the bottleneck
PROGRESS_DELAY = 2.0  # seconds before a progress bar appears
_AHEAD = 4  # tasks per thread; limits the memory of results that wait for an earlier task

T = TypeVar("T")
Item = TypeVar("Item")


def available_cpus() -> int:
    """Return the number of cores that the scheduler and the container allow this process, at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    groups = _control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min(_container_cores(group, cores) for group in groups))


def resolve_num_workers(num_workers: int | Literal["auto"], *, processes: int) -> int:
    """Return the data loading processes per training process, of which this machine has `processes` on a core each."""
    if num_workers != "auto":
        return num_workers
    return max(0, min(MAX_WORKERS, available_cpus() // processes - 1))


def map_threads(task: Callable[[int], T], count: int, *, label: str, show: bool) -> Iterator[T]:
    """Yield task(0), ..., task(count - 1) in order, computed by one thread per core; for tasks that release the GIL.

    A progress bar with the label appears after two seconds, if `show` is set.
    """
    cores = available_cpus()
    with _bar(count, label, show) as bar, ThreadPoolExecutor(cores) as threads:
        for result in map_ordered(threads, task, range(count), ahead=_AHEAD * cores):
            yield result
            bar.update()


def map_ordered(
    threads: ThreadPoolExecutor, task: Callable[[Item], T], items: Iterable[Item], *, ahead: int
) -> Iterator[T]:
    """Yield task(item) of each item in order, with at most `ahead` tasks submitted."""
    pending: deque[Future[T]] = deque()
    for item in items:
        if len(pending) == ahead:
            yield pending.popleft().result()
        pending.append(threads.submit(task, item))
    while pending:
        yield pending.popleft().result()


def map_processes(task: Callable[[Item], T], items: Sequence[Item], *, label: str, show: bool) -> Iterator[T]:
    """Yield task(item) of each item in order, computed by one process per core; for tasks that hold the GIL.

    As `map_threads`, but task, items and results must be picklable. For a single item or core no process is started.
    """
    processes = min(available_cpus(), len(items))
    with _bar(len(items), label, show) as bar, ExitStack() as stack:
        results: Iterator[T] = map(task, items)
        if processes > 1:  # of which none handles Ctrl-C
            pool = ProcessPoolExecutor(processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
            results = stack.enter_context(pool).map(task, items)
        for result in results:
            yield result
            bar.update()


def _bar(count: int, label: str, show: bool) -> tqdm:
    return progress_bar(total=count, desc=label, unit="", delay=PROGRESS_DELAY, leave=False, show=show)


def _control_groups(listing: Path, root: Path) -> list[Path]:
    """Return this process's control group (version 2) and its parents up to the root; each may have a quota."""
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    own = Path(next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), ""))
    return [root / group for group in (own, *own.parents)]


def _container_cores(group: Path, cores: int) -> int:
    """Return the CPU quota of the control group (version 2, else 1) in cores, rounded up; `cores` without a quota."""
    files = [group / "cpu.max"], [group / "cpu/cpu.cfs_quota_us", group / "cpu/cpu.cfs_period_us"]
    for parts in files:
        if all(part.is_file() for part in parts):
            quota, period = " ".join(part.read_text() for part in parts).split()
            return cores if quota in ("max", "-1") else min(cores, -(-int(quota) // int(period)))
    return cores


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's operations on one thread within the block.

    Threads synchronize after each operation and spin while they wait: where data loading processes use the same cores,
    an operation of microseconds takes as long as the scheduler runs one of those.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
