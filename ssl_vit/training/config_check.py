"""Check the training config for likely problems before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ssl_vit.config.methods import MethodConfig, OptimizerConfig, TeacherConfig, ViewsConfig
from ssl_vit.config.types import Duration, StrictConfig
from ssl_vit.methods.health import HealthWarning
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.runtime.text import pluralize

SHORT_EPOCH = 50  # steps; a warm-up of 10 epochs of one step each is over at once
LR_RANGE = 1e-6, 1e-2  # of AdamW on vision transformers, after scaling; published recipes use 1e-4 to 8e-3
MAX_TEACHER_TEMPERATURE = 0.07  # DINO's highest; above it training tends to collapse to the uniform assignment
MIN_HALF_LIVES = 5  # of the teacher's average that a run should last


def check_config(config: MethodConfig, plan: TrainingPlan, peak_lr: float) -> list[HealthWarning]:
    """Return warnings about the config of a method; empty when it looks sound.

    Args:
        config: Of the method.
        plan: Length of the run.
        peak_lr: The learning rate at the end of the warm-up.
    """
    warnings = [
        _short_epochs(config, plan),
        _learning_rate(config.optimizer, plan, peak_lr),
        _large_locals(config.views),
    ]
    teacher = getattr(config, "teacher", None)
    if isinstance(teacher, TeacherConfig):
        warnings += [_hot_teacher(teacher), _slow_teacher(teacher, plan)]
    return [warning for warning in warnings if warning]


def _durations(config: StrictConfig, prefix: str) -> Iterator[tuple[str, Duration]]:
    """Yield all durations of a config by key."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Duration):
            yield f"{prefix}.{name}", value
        elif isinstance(value, StrictConfig):
            yield from _durations(value, f"{prefix}.{name}")


def _short_epochs(config: MethodConfig, plan: TrainingPlan) -> HealthWarning | None:
    durations = _durations(config, "method")
    by_epoch = [f"{key}={span}" for key, span in durations if span.unit == "epoch" and span.value > 0]
    if plan.steps_per_epoch >= SHORT_EPOCH or not by_epoch:
        return None
    return HealthWarning(
        "short-epochs",
        f"an epoch is only {pluralize(plan.steps_per_epoch, 'step')}, so {' and '.join(by_epoch)} may be over too soon",
        "Write the duration in steps or percent, as in method.optimizer.warmup=10%.",
    )


def _learning_rate(optimizer: OptimizerConfig, plan: TrainingPlan, peak: float) -> HealthWarning | None:
    low, high = LR_RANGE
    if low <= peak <= high:
        return None
    product = f"{optimizer.lr:g} x {plan.batch_size}/{optimizer.lr_batch_size} = {peak:.3g}"
    return HealthWarning(
        "learning-rate",
        f"a learning rate of {product} is too {'high' if peak > high else 'low'} for AdamW",
        f"Set method.optimizer.lr so that it lies between {low:g} and {high:g} after scaling.",
    )


def _large_locals(views: ViewsConfig) -> HealthWarning | None:
    small, large = views.local_crops, views.global_crops
    if not small.count or small.size <= large.size:
        return None
    return HealthWarning(
        "large-locals",
        f"local views of {small.size} pixels are larger than the global ones of {large.size}, and cost more",
        f"Set method.views.local_crops.size to about {large.size // 2}.",
    )


def _hot_teacher(teacher: TeacherConfig) -> HealthWarning | None:
    highest = max(teacher.temperature, teacher.warmup_temperature)
    if highest <= MAX_TEACHER_TEMPERATURE:
        return None
    return HealthWarning(
        "hot-teacher",
        f"a teacher temperature of {highest:g} is above {MAX_TEACHER_TEMPERATURE}, where training tends to collapse",
        "Set method.teacher.temperature and .warmup_temperature to 0.04 to 0.07.",
    )


def _slow_teacher(teacher: TeacherConfig, plan: TrainingPlan) -> HealthWarning | None:
    momentum = teacher.momentum[0]
    if momentum == 0:
        return HealthWarning(
            "teacher-is-student",
            "method.teacher.momentum starts at 0: the teacher is a copy of the student",
            "Set 'method.teacher.momentum=[0.996,1.0]', or for a short run [0.98,0.995].",
        )
    half_life = math.inf if momentum == 1 else math.log(0.5) / math.log(momentum)
    if plan.total_steps >= MIN_HALF_LIVES * half_life:
        return None
    return HealthWarning(
        "slow-teacher",
        f"with method.teacher.momentum={momentum:g} half of the teacher's weights are older than {half_life:,.0f} "
        f"steps, and the run has {plan.total_steps:,}",
        "Lower it for a short run, as in 'method.teacher.momentum=[0.98,0.995]', or train longer.",
    )
