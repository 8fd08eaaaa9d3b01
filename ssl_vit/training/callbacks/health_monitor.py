"""Verdicts with numbers and remedies, as a run goes on: collapse, divergence, a teacher that is the student."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from ssl_vit.runtime.jsonl import JSONLWriter

SLOWER = "Try a lower method.optimizer.lr, a longer method.optimizer.warmup, or trainer.precision=32-true."


class HealthWarning(NamedTuple):
    """What is wrong, under a name that stays the same, and what to do about it."""

    name: str
    finding: str
    remedy: str

    def __str__(self) -> str:
        return f"[{self.name}] {self.finding}. {self.remedy}"


class HealthMonitor(L.Callback):
    """Judges the rows of metrics after the learning-rate warm-up and says so when they stay bad for a while.

    It speaks once per spell, and writes the verdict to the journal.
    """

    PATIENCE = 10  # rows in a row

    def __init__(self, prototypes: int | None, journal: JSONLWriter, *, first_step: int, every: int) -> None:
        self.prototypes = prototypes
        self.journal = journal
        self.first_step = first_step
        self.every = every
        self.step = 0  # the last one looked at; with accumulation several batches end within a step
        self.first_loss: float | None = None  # after the warm-up
        self.bad: dict[str, int] = {}  # rows in a row, by verdict
        self.verdict: HealthWarning | None = None  # that stands now

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as an uninterrupted one."""
        return {"first_loss": self.first_loss, "bad": self.bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_loss, self.bad = state_dict["first_loss"], state_dict["bad"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.step:  # still accumulating
            return
        self.step = trainer.global_step
        if self.step < self.first_step or self.step % self.every:
            return
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.first_loss is None and math.isfinite(numbers["train/loss"]):
            self.first_loss = numbers["train/loss"]
        verdict = judge(numbers, self.prototypes, self.first_loss)
        self.bad = {verdict.name: self.bad.get(verdict.name, 0) + 1} if verdict else {}
        self.verdict = verdict if verdict and self.bad[verdict.name] >= self.PATIENCE else None
        if verdict and self.bad[verdict.name] == self.PATIENCE and trainer.is_global_zero:
            rank_zero_warn(f"step {self.step}: {verdict}")
            self.journal.write(self.step - 1, **verdict._asdict())


INFORMATION = 0.05  # nats that the teacher's assignment tells about the image; a healthy run has 1 and more
SPREAD = 0.05  # of the features; a healthy run has 0.3 to 1
RISE = 0.5  # of the loss over its value after the warm-up, as a share of it and at least as nats


def judge(numbers: dict[str, float], prototypes: int | None, first_loss: float | None) -> HealthWarning | None:
    """The verdict on one row of metrics, or None when it looks healthy.

    Args:
        numbers: The row, by name.
        prototypes: K, of a method that has a teacher; None for one that has not.
        first_loss: The loss after the warm-up.
    """
    loss = numbers["train/loss"]
    if first_loss is not None and not loss <= first_loss + RISE * max(1.0, abs(first_loss)):
        return HealthWarning("diverging", f"the loss is {loss:.3g}, and was {first_loss:.3g} after the warm-up", SLOWER)
    if prototypes and numbers["train/teacher_distance"] == 0:
        return HealthWarning(
            "teacher-is-student",
            "the teacher's weights are those of the student",
            "Set 'method.teacher.momentum=[0.996,1.0]', or for a short run [0.98,0.995].",
        )
    if prototypes and numbers["train/information"] < INFORMATION:
        return _collapsed(numbers, prototypes)
    if numbers["train/spread"] < SPREAD:
        return HealthWarning(
            "features-collapse",
            f"the features' spread is {numbers['train/spread']:.3f}, where 1 is even and 0 means that all images "
            "look the same",
            "Try a lower method.optimizer.lr, a longer method.optimizer.warmup, or backbone.init=jax for a small ViT.",
        )
    return None


def _collapsed(numbers: dict[str, float], prototypes: int) -> HealthWarning:
    entropy, most = numbers["train/teacher_entropy"], math.log(prototypes)
    told = (
        f"the teacher's assignment tells {numbers['train/information']:.3f} nats about an image, its entropy is "
        f"{entropy:.2f} of at most {most:.2f}"
    )
    if entropy > most / 2:
        return HealthWarning(
            "uniform-collapse",
            f"collapsed to the uniform answer: {told}",
            "Try a lower method.teacher.temperature, backbone.init=jax for a small ViT, weaker augmentation, "
            "or a lower method.teacher.momentum for a short run.",
        )
    return HealthWarning(
        "single-collapse",
        f"collapsed to one prototype: {told}",
        "Try a higher method.teacher.temperature (up to 0.07), method.teacher.center_momentum=0.9, "
        "or a lower method.optimizer.lr.",
    )
