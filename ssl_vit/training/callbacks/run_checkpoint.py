"""Checkpoint callback: save by time and epoch, stop cleanly on request or at `max_time`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ssl_vit.config.pretrain import TrainerConfig
from ssl_vit.models.checkpoint import LAST
from ssl_vit.runtime.distributed import any_rank, norms
from ssl_vit.runtime.errors import AllRanksError
from ssl_vit.training.callbacks.preemption import PreemptionHandler
from ssl_vit.training.checkpointing import BEST, AtomicCheckpointIO, link_checkpoint

log = logging.getLogger(__name__)


class RunCheckpoint(L.Callback):
    """Writer of `last.ckpt` by time and after epochs, of chosen epochs' checkpoints, and of the best one.

    Short epochs, except the first, do not make it save more often than ten times per `checkpoint_every`. A model with
    a weight that is not finite is not saved: the run stops at the checkpoint before. All processes save, and stop,
    after the same step.

    The callback that `is_best` asks must see the end of a step before this one; `resume_with` is for messages.

    Raises:
        AllRanksError: From a hook of Lightning: a checkpoint cannot be written, for example because the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainerConfig,
        *,
        signals: PreemptionHandler,
        is_best: Callable[[], bool] = lambda: False,
        resume_with: str = "run.resume=true",
    ) -> None:
        self.folder = folder
        self.signals = signals
        self.is_best = is_best
        self.resume_with = resume_with
        self.every = config.checkpoint_every.total_seconds()
        self.max_time = config.max_time.total_seconds() if config.max_time else float("inf")
        self.keep_every_epochs = config.keep_every_epochs
        self.io = AtomicCheckpointIO()
        self.saved_step = 0  # optimizer steps in the newest checkpoint
        self.threads: int | None = None  # of torch, when the resumed checkpoint was written
        self.started = 0.0  # time of the first step; 0 before
        self.diverged = self.timed_out = False

    @property
    def resume_hint(self) -> str:
        """How to resume, for the messages of what stopped the run."""
        if not self.saved_step:
            return "No checkpoint was written."
        if not (self.folder / LAST).is_file():
            return f"The checkpoint of step {self.saved_step:,} is gone: {self.folder} was removed or moved."
        return f"The checkpoint of step {self.saved_step:,} is intact: resume from it with {self.resume_with}."

    def state_dict(self) -> dict[str, Any]:
        """Return the number of threads, which changes the last bits of sums on CPUs."""
        return {"threads": torch.get_num_threads()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.threads = state_dict["threads"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        threads = torch.get_num_threads()
        if self.threads not in (None, threads) and module.device.type == "cpu" and trainer.is_global_zero:
            log.warning(
                f"resumed with {threads} threads instead of {self.threads}: equal to the uninterrupted run but for "
                f"rounding. OMP_NUM_THREADS={self.threads} continues it to the last bit"
            )
        self.started = self.saved = time.monotonic()
        self.step = self.saved_step = trainer.global_step
        (best,) = any_rank(self.is_best())
        if best:  # the weights that the run starts from, until others are better
            (self.folder / BEST).unlink(missing_ok=True)  # of a run killed before: it would become previous.ckpt
            self._write(trainer, BEST)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.step or trainer.should_stop:  # still accumulating, or not worth saving
            return
        self.step = trainer.global_step
        # Not in on_train_epoch_end: from a checkpoint written there Lightning 2.6 resumes with a broken epoch.
        epoch = trainer.current_epoch + 1
        keep = bool(trainer.is_last_batch and self.keep_every_epochs and epoch % self.keep_every_epochs == 0)
        now = time.monotonic()
        over = now - self.started > self.max_time
        wait = self.every / 10 if trainer.is_last_batch and self.saved_step else self.every
        due = now - self.saved > wait or (trainer.is_last_batch and not self.saved_step)
        self.timed_out, interrupted, due = any_rank(over, self.signals.received is not None, due or self.is_best())
        stop = self.timed_out or interrupted
        if stop or keep or due or trainer.global_step == trainer.max_steps:
            names = [f"epoch_{epoch:04d}.ckpt"] if keep else []
            self._save(trainer, module, [*names, BEST] if self.is_best() else names)
        if stop:
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer, module: L.LightningModule, more_names: list[str]) -> None:
        parameters = [parameter.detach() for parameter in module.parameters()]
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        broken = any(not norms(values).isfinite().all() for values in (parameters, buffers) if values)
        (broken,) = any_rank(broken)
        if broken:
            self.diverged = trainer.should_stop = True
            return
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # the rows of metrics first: they belong to this checkpoint
        self._write(trainer, LAST)
        if trainer.is_global_zero:
            for name in more_names:
                link_checkpoint(self.folder / LAST, name)
        self.saved, self.saved_step = time.monotonic(), trainer.global_step

    def _write(self, trainer: L.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / name)
        (failed,) = any_rank(self.io.failure is not None)
        if failed:
            reason = self.io.failure.strerror if self.io.failure else "the first process could not write it"
            raise AllRanksError(
                f"the checkpoint of step {trainer.global_step:,} cannot be written to {self.folder}: {reason}. "
                f"{self.resume_hint}"
            )
