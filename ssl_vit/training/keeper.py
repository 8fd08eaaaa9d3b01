"""Keeps the run: checkpoints by time and by epoch, a clean stop on Ctrl-C, SIGTERM or when its time is up."""

from __future__ import annotations

import signal
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import cast

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor


class Keeper(L.Callback):
    """Writes `last.ckpt` whole or not at all, every `every` and after epochs; keeps some epochs for good.

    Short epochs do not make it write more often than ten times per `every`. A network whose loss is no longer finite is
    not saved: the run stops on the checkpoint before. The first Ctrl-C or SIGTERM saves after the step at hand and
    stops; a second Ctrl-C stops at once.

    Args:
        folder: Of the checkpoints.
        every: Longest time between two checkpoints.
        max_time: Save and stop after this time; None: no limit.
        keep_every_epochs: Also keep `epoch_NNNN.ckpt` of every n-th epoch; None: only the last.
    """

    def __init__(
        self, folder: Path, *, every: timedelta, max_time: timedelta | None, keep_every_epochs: int | None
    ) -> None:
        self.folder = folder
        self.every = every.total_seconds()
        self.max_time = max_time.total_seconds() if max_time else float("inf")
        self.keep_every_epochs = keep_every_epochs
        self.asked_to_stop = False
        self.diverged = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = self.saved = time.monotonic()
        self.step = trainer.global_step
        self.handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: STEP_OUTPUT, *_: object
    ) -> None:
        if trainer.global_step == self.step:  # still accumulating
            return
        self.step = trainer.global_step
        now = time.monotonic()
        stop = self._any(trainer, self.asked_to_stop or now - self.started > self.max_time)
        # Not in on_train_epoch_end: from a checkpoint written there Lightning 2.6 resumes with a broken epoch.
        epoch = trainer.current_epoch + 1
        keep = bool(trainer.is_last_batch and self.keep_every_epochs and epoch % self.keep_every_epochs == 0)
        wait = self.every / 10 if trainer.is_last_batch else self.every
        at_end = trainer.global_step == trainer.max_steps
        if stop or keep or at_end or self._any(trainer, now - self.saved > wait):
            self.diverged = self._any(trainer, not bool(cast(dict[str, Tensor], outputs)["loss"].isfinite()))
            if not self.diverged:
                self._save(trainer, "last.ckpt", *([f"epoch_{epoch:04d}.ckpt"] if keep else []))
        if stop or self.diverged:
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer, *names: str) -> None:
        for name in names:
            self._write(trainer, name)
        self.saved = time.monotonic()

    def _write(self, trainer: L.Trainer, name: str) -> None:
        temporary = self.folder / f"{name}.tmp"
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            temporary.replace(self.folder / name)
            for logger in trainer.loggers:
                logger.save()

    @staticmethod
    def _any(trainer: L.Trainer, decision: bool) -> bool:
        """Whether any process says so: all must save, and stop, at the same step."""
        return (trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(decision, all=False)) or decision
