"""One thread for work that is many short operations on what a core's cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operations on the calling thread alone, within the `with` block.

    Threads meet after each operation, and spin while they wait: where loading workers need the cores as well, an
    operation of microseconds then takes as long as the system lets a worker run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
