"""Schedules as pure functions of the optimizer step: resuming a run needs nothing but the step."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


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
