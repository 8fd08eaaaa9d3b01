"""How many cores this process may use, and work spread over them."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from tqdm import tqdm

from ssl_vit.runtime.progress import progress_bar

MOST_WORKERS = 16  # beyond it, disks and the collecting process are the limit
PATIENCE = 2.0  # seconds without a progress bar
_AHEAD = 4  # tasks under way per thread; bounds the memory that finished ones take while an earlier one lasts

T = TypeVar("T")
Item = TypeVar("Item")


def available_cpus() -> int:
    """The cores that the scheduler and the container leave to this process, at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    groups = _control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min(_container_cores(group, cores) for group in groups))


def resolve_num_workers(num_workers: int | Literal["auto"], *, processes: int) -> int:
    """Loading processes beside each of `processes` training processes on this machine, which keep a core each."""
    if num_workers != "auto":
        return num_workers
    return max(0, min(MOST_WORKERS, available_cpus() // processes - 1))


def map_threads(task: Callable[[int], T], count: int, *, label: str, show: bool) -> Iterator[T]:
    """task(0), ..., task(count - 1) in order, computed by as many threads as there are cores.

    Args:
        task: Decoding an image lets other threads run meanwhile.
        count: How many.
        label: Beside the progress bar, which appears when it takes longer than two seconds.
        show: Whether there is one at all.
    """
    cores = available_cpus()
    with _bar(count, label, show) as bar, ThreadPoolExecutor(cores) as threads:
        for result in map_ordered(threads, task, range(count), ahead=_AHEAD * cores):
            yield result
            bar.update()


def map_ordered(
    threads: ThreadPoolExecutor, task: Callable[[Item], T], items: Iterable[Item], *, ahead: int
) -> Iterator[T]:
    """task(item) of each item, in their order, at most `ahead` of them under way."""
    under_way: deque[Future[T]] = deque()
    for item in items:
        if len(under_way) == ahead:
            yield under_way.popleft().result()
        under_way.append(threads.submit(task, item))
    while under_way:
        yield under_way.popleft().result()


def map_processes(task: Callable[[Item], T], subjects: Sequence[Item], *, label: str, show: bool) -> Iterator[T]:
    """Each subject's task in order, computed by as many processes as there are cores; for work that is Python's own.

    Args:
        task: A function that can be pickled; so can what it takes and gives.
        subjects: What to compute it for; with a single one no process is started.
        label: Beside the progress bar, which appears when it takes longer than two seconds.
        show: Whether there is one at all.
    """
    processes = min(available_cpus(), len(subjects))
    with _bar(len(subjects), label, show) as bar:
        if processes <= 1:
            for subject in subjects:
                yield task(subject)
                bar.update()
            return
        # Ctrl-C is for this process to handle.
        pool = ProcessPoolExecutor(processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
        with pool:
            for result in pool.map(task, subjects):
                yield result
                bar.update()


def _bar(count: int, label: str, show: bool) -> tqdm:
    return progress_bar(total=count, desc=label, unit="", delay=PATIENCE, leave=False, show=show)


def _control_groups(listing: Path, root: Path) -> list[Path]:
    """This process's control group (version 2) and those around it, each of which may have a quota, up to the root."""
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    own = Path(next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), ""))
    return [root / group for group in (own, *own.parents)]


def _container_cores(group: Path, cores: int) -> int:
    """The CPU quota of the control group (version 2, else 1) in whole cores, rounded up; `cores` without a quota."""
    files = [group / "cpu.max"], [group / "cpu/cpu.cfs_quota_us", group / "cpu/cpu.cfs_period_us"]
    for parts in files:
        if all(part.is_file() for part in parts):
            quota, period = " ".join(part.read_text() for part in parts).split()
            return cores if quota in ("max", "-1") else min(cores, -(-int(quota) // int(period)))
    return cores


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's operations on the calling thread alone, within the `with` block.

    Threads meet after each operation, and spin while they wait: where loading num_workers need the cores as well, an
    operation of microseconds then takes as long as the system lets a worker run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
