"""Length and schedules of a run as pure functions of the optimizer step: resuming needs only the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ssl_vit.config.evaluate import FinetuneConfig
from ssl_vit.config.methods import TeacherConfig
from ssl_vit.config.pretrain import TrainingConfig

Schedule = Callable[[int], float]


class TrainingPlan(NamedTuple):
    """Length of a run in optimizer steps, and the numbers that its schedules and randomness derive from."""

    total_steps: int
    steps_per_epoch: int
    batch_size: int  # global: over all processes and accumulated micro-batches
    log_every: int
    seed: int


def make_plan(config: TrainingConfig | FinetuneConfig, num_images: int) -> TrainingPlan:
    """Return the plan of a run on so many images."""
    steps_per_epoch = max(1, num_images // config.data.batch_size)
    total_steps = config.trainer.max_steps or config.trainer.max_epochs * steps_per_epoch
    log_every = config.trainer.log_every_n_steps
    return TrainingPlan(total_steps, steps_per_epoch, config.data.batch_size, log_every, config.seed)


def cosine(start: float, end: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Return a linear warm-up from 0 to `start`, then half a cosine from `start` to `end`.

    The formula of DINO (`utils.cosine_scheduler`): with n steps after the warm-up, step i of them gets
    end + (start - end) (1 + cos(pi i / n)) / 2, so `end` itself is not reached. The first of several
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


def first_momentum(config: TeacherConfig, plan: TrainingPlan) -> float:
    """Return the teacher's momentum at the first step: 2^(-1 / half-life in steps), or as `momentum` says."""
    if config.half_life is None:
        return config.momentum[0]
    return float(0.5 ** (1 / max(1, config.half_life.steps(plan.steps_per_epoch, plan.total_steps))))


def teacher_temperature(start: float, end: float, warmup_epochs: int, steps_per_epoch: int) -> Schedule:
    """Return a linear schedule from `start` to `end` over `warmup_epochs`, one value per epoch; then constant.

    Both ends are included. As in DINO (`DINOLoss.teacher_temp_schedule`) it changes per epoch, not per step.
    """

    def value(step: int) -> float:
        epoch = step // steps_per_epoch
        if epoch >= warmup_epochs:
            return end
        return start + (end - start) * epoch / max(1, warmup_epochs - 1)

    return value
