"""Which of several processes this is, known before they have met."""

from __future__ import annotations

import os


def first_process() -> bool:
    """Whether this is the process that writes files and speaks for all.

    Lightning and torchrun tell a process its place through the environment; the first that Lightning starts has none.
    """
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
