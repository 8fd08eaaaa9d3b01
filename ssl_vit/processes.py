"""Which of several processes this is, known before they have met, and the signals that ask it to stop."""

from __future__ import annotations

import os
import signal

# What asks a run to stop: Ctrl-C, SIGTERM, and the warnings of SLURM and submitit before the time of a job is up.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if os.name == "posix":
    STOP_SIGNALS += [signal.SIGUSR1, signal.SIGUSR2]


def first_process() -> bool:
    """Whether this is the process that writes files and speaks for all.

    Lightning and torchrun tell a process its place through the environment; the first that Lightning starts has none.
    """
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
