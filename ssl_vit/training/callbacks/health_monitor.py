"""Health warnings during a run: collapse, divergence, a teacher that equals the student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from ssl_vit.methods.health import HealthCheck, HealthWarning, Metrics
from ssl_vit.runtime.atomic_io import JSONLWriter

MAX_LOSS_RISE = 0.5  # over its value after the warm-up: as a fraction of it, and at least as nats


class HealthMonitor(L.Callback):
    """Checker of the rows of metrics after the learning-rate warm-up; it warns when they stay bad for a while.

    Each warning is given once until the metrics recover, and written to the journal, as are those of `check_config`.
    The method's checks come most important first; that the loss does not rise is checked before them.
    """

    PATIENCE = 10  # rows in a row

    def __init__(
        self,
        checks: Sequence[HealthCheck],
        journal: JSONLWriter,
        *,
        config_warnings: Sequence[HealthWarning] = (),
        first_step: int,
        every: int,
    ) -> None:
        self.checks = checks
        self.journal = journal
        self.config_warnings = config_warnings
        self.first_step = first_step  # end of the warm-up
        self.every = every  # optimizer steps between two rows
        self.step = 0  # the last one checked; with accumulation several batches end within a step
        self.first_loss: float | None = None  # after the warm-up
        self.bad: dict[str, int] = {}  # rows in a row, by warning
        self.current: HealthWarning | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to warn as an uninterrupted one."""
        return {"first_loss": self.first_loss, "bad": self.bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_loss, self.bad = state_dict["first_loss"], state_dict["bad"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step
        if self.step == 0 and trainer.is_global_zero:
            for warning in self.config_warnings:
                self.journal.write(0, **warning._asdict())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.step:  # still accumulating
            return
        self.step = trainer.global_step
        if self.step < self.first_step or self.step % self.every:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.first_loss is None and math.isfinite(metrics["train/loss"]):
            self.first_loss = metrics["train/loss"]
        warning = check_metrics(metrics, self.checks, self.first_loss)
        self.bad = {warning.name: self.bad.get(warning.name, 0) + 1} if warning else {}
        self.current = warning if warning and self.bad[warning.name] >= self.PATIENCE else None
        if warning and self.bad[warning.name] == self.PATIENCE and trainer.is_global_zero:
            rank_zero_warn(f"step {self.step}: {warning}")
            self.journal.write(self.step - 1, **warning._asdict())

    def summary(self) -> list[str]:
        """Return the line about the health at the end, if there is a problem."""
        return [f"Health: {self.current}"] if self.current else []


def check_metrics(metrics: Metrics, checks: Sequence[HealthCheck], first_loss: float | None) -> HealthWarning | None:
    """Return the most important warning about one row of metrics, or None; `first_loss` is that after the warm-up."""
    loss = metrics["train/loss"]
    if first_loss is not None and not loss <= first_loss + MAX_LOSS_RISE * max(1.0, abs(first_loss)):
        return HealthWarning(
            "diverging",
            f"the loss is {loss:.3g}, and was {first_loss:.3g} after the warm-up",
            "Try a lower method.optimizer.lr, a longer method.optimizer.warmup, or trainer.precision=32-true.",
        )
    return next((warning for check in checks if (warning := check(metrics))), None)
