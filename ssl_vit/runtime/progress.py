"""Progress bars for terminals, and rare progress lines for log files."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL_S = 10.0  # between two lines where stderr is no terminal, for example in a job's log file


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **settings: Any) -> tqdm[Any]:
    """Return a tqdm bar; where stderr is no terminal it writes at most one line every ten seconds.

    Args:
        iterable: Passed to tqdm.
        show: Whether to show anything at all, for example only in the first process.
        settings: Passed to tqdm: `total`, `desc`, `unit`, ...
    """
    if not sys.stderr.isatty():
        settings = {"mininterval": LOG_INTERVAL_S, "delay": LOG_INTERVAL_S} | settings
    return tqdm(iterable, disable=not show, dynamic_ncols=True, **settings)
