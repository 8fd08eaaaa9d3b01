"""Check the training config for likely problems before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ssl_vit.config.methods import MethodConfig, TeacherConfig
from ssl_vit.config.types import Duration, StrictConfig
from ssl_vit.methods.health import HealthWarning
from ssl_vit.methods.schedules import TrainingPlan, first_momentum
from ssl_vit.runtime.text import pluralize

SHORT_EPOCH = 50  # steps; a warm-up of 10 epochs of one step each is over at once
LR_RANGE = 1e-6, 1e-2  # of AdamW on vision transformers, after scaling; published recipes use 1e-4 to 8e-3
MAX_TEACHER_TEMPERATURE = 0.07  # DINO's highest; above it training tends to collapse to the uniform assignment
MIN_HALF_LIVES = 5  # of the teacher's average that a run should last
SHORT_RUN_MOMENTUM = 0.9, 0.98  # lowest and highest start that is proposed for a short run


def check_config(config: MethodConfig, plan: TrainingPlan, peak_lr: float) -> list[HealthWarning]:
    """Return warnings about the config of a method; `peak_lr` is the learning rate at the end of the warm-up."""
    teacher = getattr(config, "teacher", None)
    teacher_warnings = _check_teacher(teacher, plan) if isinstance(teacher, TeacherConfig) else ()
    return [*_check_method(config, plan, peak_lr), *teacher_warnings]


def _check_method(config: MethodConfig, plan: TrainingPlan, peak_lr: float) -> Iterator[HealthWarning]:
    by_epoch = {key: span for key, span in _durations(config, "method") if span.unit == "epoch" and span.value > 0}
    if plan.steps_per_epoch < SHORT_EPOCH and by_epoch:
        spans = [f"{key}={str(span).removesuffix('s' if span.value == 1 else '')}" for key, span in by_epoch.items()]
        yield HealthWarning(
            "short-epochs",
            f"an epoch is only {pluralize(plan.steps_per_epoch, 'step')}, so {' and '.join(spans)} may be over too "
            "soon",
            f"Write the duration in steps or percent, as in {next(iter(by_epoch))}=10%.",
        )
    low, high = LR_RANGE
    if not low <= peak_lr <= high:
        optimizer = config.optimizer
        product = f"{optimizer.lr:g} x {plan.batch_size}/{optimizer.lr_batch_size} = {peak_lr:.3g}"
        yield HealthWarning(
            "learning-rate",
            f"a learning rate of {product} is too {'high' if peak_lr > high else 'low'} for AdamW",
            f"Set method.optimizer.lr so that it lies between {low:g} and {high:g} after scaling.",
        )
    small, large = config.views.local_crops, config.views.global_crops
    if small.count and small.size > large.size:
        yield HealthWarning(
            "large-locals",
            f"local views of {small.size} pixels are larger than the global ones of {large.size}, and cost more",
            f"Set method.views.local_crops.size to about {large.size // 2}.",
        )


def _check_teacher(teacher: TeacherConfig, plan: TrainingPlan) -> Iterator[HealthWarning]:
    highest, momentum = max(teacher.temperature, teacher.warmup_temperature), first_momentum(teacher, plan)
    if highest > MAX_TEACHER_TEMPERATURE:
        yield HealthWarning(
            "hot-teacher",
            f"a teacher temperature of {highest:g} is above {MAX_TEACHER_TEMPERATURE}, where training tends to "
            "collapse",
            "Set method.teacher.temperature and .warmup_temperature to 0.04 to 0.07.",
        )
    if momentum == 0:
        yield HealthWarning(
            "teacher-is-student",
            "method.teacher.momentum starts at 0: the teacher is a copy of the student",
            "Set 'method.teacher.momentum=[0.996,1.0]', or for a short run [0.98,0.995].",
        )
        return
    half_life = math.inf if momentum == 1 else math.log(0.5) / math.log(momentum)
    if plan.total_steps < MIN_HALF_LIVES * half_life:
        lowest, start = SHORT_RUN_MOMENTUM
        start = min(start, math.floor(100 * 0.5 ** (MIN_HALF_LIVES / plan.total_steps)) / 100)  # long enough with it
        lower = f"Lower it for a short run, as in 'method.teacher.momentum=[{start:g},0.995]', or train longer."
        yield HealthWarning(
            "slow-teacher",
            f"with a momentum of {momentum:g} half of the teacher's weights are older than "
            f"{half_life:,.0f} steps, and the run has {plan.total_steps:,}",
            lower if start >= lowest else "Train longer.",
        )


def _durations(config: StrictConfig, prefix: str) -> Iterator[tuple[str, Duration]]:
    """Yield all durations of a config by key."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Duration):
            yield f"{prefix}.{name}", value
        elif isinstance(value, StrictConfig):
            yield from _durations(value, f"{prefix}.{name}")
