"""Keeps the run: checkpoints by time and by epoch, and a clean stop when it is asked for or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import lightning as L

from ssl_vit.config.pretrain import TrainerConfig
from ssl_vit.models.checkpoint_file import LAST
from ssl_vit.runtime.distributed import any_rank, norms
from ssl_vit.runtime.errors import AllRanksError
from ssl_vit.training.callbacks.preemption import PreemptionHandler
from ssl_vit.training.checkpointing import BEST, AtomicCheckpointIO, link_checkpoint


class RunCheckpoint(L.Callback):
    """Writes `last.ckpt` every `every` and after epochs, and keeps those of some epochs, and the best, for good.

    Short epochs, but for the first, do not make it write more often than ten times per `every`. A model with a weight
    that is not finite is not saved: the run stops on the checkpoint before. All processes save, and stop, after the
    same step.

    Args:
        folder: Of the checkpoints.
        signals: Whether a stop has been asked for.
        improved: Whether the step at hand is the best so far; it must have seen the end of the step before.
        settings: How long it may go without a checkpoint, how long in all, and which epochs' `epoch_NNNN.ckpt` to keep.

    Raises:
        AllRanksError: From a hook of Lightning: a checkpoint cannot be written, because the disk is full, say.
    """

    def __init__(
        self,
        folder: Path,
        signals: PreemptionHandler,
        improved: Callable[[], bool],
        settings: TrainerConfig,
    ) -> None:
        self.folder = folder
        self.signals = signals
        self.improved = improved
        self.every = settings.checkpoint_every.total_seconds()
        self.max_time = settings.max_time.total_seconds() if settings.max_time else float("inf")
        self.keep_every_epochs = settings.keep_every_epochs
        self.files = AtomicCheckpointIO()
        self.saved_step = 0  # optimizer steps in the newest checkpoint
        self.diverged = False

    @property
    def way_on(self) -> str:
        """Where the run stands, for the messages of what stopped it."""
        if not self.saved_step:
            return "Nothing had been saved yet."
        return (
            f"The checkpoint of step {self.saved_step:,} is intact: the same command with run.resume=true goes on from "
            "there."
        )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = self.saved = time.monotonic()
        self.step = self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.step or trainer.should_stop:  # still accumulating, or no longer worth keeping
            return
        self.step = trainer.global_step
        # Not in on_train_epoch_end: from a checkpoint written there Lightning 2.6 resumes with a broken epoch.
        epoch = trainer.current_epoch + 1
        keep = bool(trainer.is_last_batch and self.keep_every_epochs and epoch % self.keep_every_epochs == 0)
        now = time.monotonic()
        asked = self.signals.received is not None or now - self.started > self.max_time
        wait = self.every / 10 if trainer.is_last_batch and self.saved_step else self.every
        due = now - self.saved > wait or (trainer.is_last_batch and not self.saved_step)
        stop, due = any_rank(asked, due or self.improved())
        if stop or keep or due or trainer.global_step == trainer.max_steps:
            names = [f"epoch_{epoch:04d}.ckpt"] if keep else []
            self._save(trainer, module, [*names, BEST] if self.improved() else names)
        if stop:
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer, module: L.LightningModule, kept_names: list[str]) -> None:
        parameters = [parameter.detach() for parameter in module.parameters()]
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        broken = any(not norms(values).isfinite().all() for values in (parameters, buffers) if values)
        (broken,) = any_rank(broken)
        if broken:
            self.diverged = trainer.should_stop = True
            return
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # the rows of metrics up to here, before the checkpoint that they belong to
        trainer.save_checkpoint(self.folder / LAST)
        (failed,) = any_rank(self.files.failure is not None)
        if failed:
            reason = self.files.failure.strerror if self.files.failure else "the first process could not write it"
            raise AllRanksError(
                f"the checkpoint of step {trainer.global_step:,} cannot be written to {self.folder}: {reason}. "
                f"{self.way_on}"
            )
        if trainer.is_global_zero:
            for name in kept_names:
                link_checkpoint(self.folder / LAST, name)
        self.saved, self.saved_step = time.monotonic(), trainer.global_step
