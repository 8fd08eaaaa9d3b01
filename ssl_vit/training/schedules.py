"""Schedules as pure functions of the optimizer step: resuming a run needs nothing but the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Duration:
    """A length of training in one of three units, turned into optimizer steps in one place.

    >>> Duration.parse("2 epochs").steps(steps_per_epoch=50, total_steps=1000)
    100
    >>> Duration.parse("10%").steps(steps_per_epoch=50, total_steps=1000)
    100
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read `100 steps`, `1.5 epochs` or `10%` (of the whole run).

        Raises:
            ValueError: The text is none of these.
        """
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?(steps?|epochs?|%)", text.strip())
        if not match:
            raise ValueError("write a duration as 100steps, 1.5epochs or 10% (of the run)")
        return cls(float(match[1]), match[2].rstrip("s"))

    def __str__(self) -> str:
        return f"{self.value:.15g}%" if self.unit == "%" else f"{self.value:.15g} {self.unit}s"

    def steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """The duration in whole optimizer steps."""
        per_unit = {"step": 1.0, "epoch": float(steps_per_epoch), "%": total_steps / 100}[self.unit]
        return round(self.value * per_unit)


def cosine(start: float, end: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up from 0 to `start`, then half a cosine from `start` to `end`.

    The formula of DINO (`utils.cosine_scheduler`): with n steps after the warm-up, step i of them gets
    end + (start - end) (1 + cos(pi i / n)) / 2, so `end` itself is approached and not reached. The first of several
    warm-up steps has value 0 and the last one has `start`. From `total_steps` on the value stays at `end`.

    Raises:
        ValueError: The warm-up is longer than the run.
    """
    if warmup_steps > total_steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps does not fit into a run of {total_steps} steps")
    decay_steps = total_steps - warmup_steps

    def value(step: int) -> float:
        if step < warmup_steps:
            return start * step / max(1, warmup_steps - 1)
        if step >= total_steps:
            return end
        return end + (start - end) * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps)) / 2

    return value


def teacher_temperature(start: float, end: float, warmup_epochs: int, steps_per_epoch: int) -> Schedule:
    """Linear from `start` to `end` over `warmup_epochs`, one value per epoch, both ends included; then constant.

    Per epoch, not per step, as in DINO (`DINOLoss.teacher_temp_schedule`).
    """

    def value(step: int) -> float:
        epoch = step // steps_per_epoch
        if epoch >= warmup_epochs:
            return end
        return start + (end - start) * epoch / max(1, warmup_epochs - 1)

    return value
