"""A verdict in words when a run diverges, or collapses: every picture gets the same answer."""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

AFTER_DIVERGENCE = (
    "Start anew with a lower method.optimizer.lr, a longer method.optimizer.warmup, or trainer.precision=32-true."
)


class CollapseMonitor(L.Callback):
    """Says so, with the numbers and what to try, when for a while every picture gets the same answer, or none.

    It looks at the rows of metrics after the learning-rate warm-up and speaks once per collapse.
    """

    INFORMATION = 0.05  # nats that the teacher's assignment tells about the picture; a healthy run has 1 and more
    SPREAD = 0.05  # of the features; a healthy run has 0.3 to 1
    PATIENCE = 10  # rows in a row

    def __init__(self, prototypes: int | None, *, first_step: int, every: int) -> None:
        self.prototypes = prototypes
        self.first_step = first_step
        self.every = every
        self.step = 0  # the last one looked at; with accumulation several batches end within a step
        self.bad_rows = 0
        self.verdict: str | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.step:  # still accumulating
            return
        self.step = trainer.global_step
        if self.step < self.first_step or self.step % self.every:
            return
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        verdict = collapse(numbers, self.prototypes)
        self.bad_rows = self.bad_rows + 1 if verdict else 0
        self.verdict = verdict if self.bad_rows >= self.PATIENCE else None
        if self.bad_rows == self.PATIENCE:
            rank_zero_warn(f"step {trainer.global_step}: {verdict}")


def collapse(numbers: dict[str, float], prototypes: int | None) -> str | None:
    """The verdict on one row of metrics, or None when it looks healthy."""
    if not math.isfinite(numbers["train/loss"]):
        return f"diverged: the loss is {numbers['train/loss']}. {AFTER_DIVERGENCE}"
    if prototypes and numbers["train/information"] < CollapseMonitor.INFORMATION:
        entropy, most = numbers["train/teacher_entropy"], math.log(prototypes)
        told = f"the teacher's assignment tells {numbers['train/information']:.3f} nats about a picture"
        if entropy > most / 2:
            return (
                f"collapsed to the uniform answer: {told}, its entropy is {entropy:.2f} of at most {most:.2f}. "
                "Try a lower method.teacher.temperature, backbone.init=jax for a small ViT, weaker augmentation, "
                "or a lower method.teacher.momentum for a short run."
            )
        return (
            f"collapsed to one prototype: {told}, its entropy is {entropy:.2f} of at most {most:.2f}. "
            "Try a higher method.teacher.temperature (up to 0.07), method.teacher.center_momentum=0.9, "
            "or a lower method.optimizer.lr."
        )
    if numbers["train/spread"] < CollapseMonitor.SPREAD:
        return (
            f"collapsed features: their spread is {numbers['train/spread']:.3f}, where 1 is even and 0 means that all "
            "pictures look the same. Try a lower method.optimizer.lr, a longer method.optimizer.warmup, "
            "or backbone.init=jax for a small ViT."
        )
    return None
