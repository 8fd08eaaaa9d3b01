"""Signals that ask a run to stop: Ctrl-C, SIGTERM, and the warnings of SLURM and submitit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from types import FrameType

import lightning as L

from ssl_vit.runtime.launch import STOP_SIGNALS

_ECHO_S = 2.0  # launchers forward a signal that their processes have already received


class PreemptionHandler(L.Callback):
    """Owner of the stop signals; RunCheckpoint then saves and stops after the current step.

    The same signal again, later than an echo, has its default effect: a second Ctrl-C stops at once. The previous
    handlers return when training ends.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
        elif number == self.received and time.monotonic() - self._at > _ECHO_S:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)

    def requeue_job(self) -> str | None:
        """Requeue the SLURM job, or let submitit do so, once the run is saved; return what happened, if anything."""
        if os.name != "posix" or self.received is None:
            return None
        job = slurm_job()
        if self.received == signal.SIGUSR1 and job:
            if not shutil.which("scontrol"):
                return f"SLURM job {job} is not requeued: scontrol is not on the PATH"
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            outcome = "is requeued" if done.returncode == 0 else f"cannot be requeued: {done.stderr.strip()}"
            return f"SLURM job {job} {outcome}"
        if self.received == signal.SIGUSR2 and callable(signal.getsignal(signal.SIGUSR2)):
            signal.raise_signal(signal.SIGUSR2)  # submitit's own handler, which resubmits the job
        return None


def slurm_job() -> str | None:
    """Return the id of this process's SLURM job, as `scontrol` takes it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return job if re.fullmatch(r"[0-9_]+", job) else None


def requeued() -> bool:
    """Return whether SLURM has restarted this job."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
