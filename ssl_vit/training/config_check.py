"""What can be seen of a run's health before its first step, from its configuration alone."""

from __future__ import annotations

import math

from ssl_vit.config.pretrain import DINOConfig, OptimizerConfig, SiTConfig, TeacherConfig, ViewsConfig
from ssl_vit.methods.base import TrainingPlan
from ssl_vit.training.callbacks.health_monitor import HealthWarning

SHORT_EPOCH = 50  # steps; a warm-up of 10 epochs of one step each is over before it has begun
LR_RANGE = 1e-6, 1e-2  # of AdamW on vision transformers, after scaling; published recipes use 1e-4 to 8e-3
HOT_TEACHER = 0.07  # DINO's highest temperature; above it training tends to collapse to the uniform answer
HALF_LIVES = 5  # of the teacher's memory that a run should last


def check_config(config: DINOConfig | SiTConfig, plan: TrainingPlan, peak_lr: float) -> list[HealthWarning]:
    """The verdicts on a configuration; empty when there is nothing to say.

    Args:
        config: Of the method.
        plan: Length of the run.
        peak_lr: The learning rate at the end of the warm-up.
    """
    verdicts = [
        _short_epochs(config, plan),
        _learning_rate(config.optimizer, plan, peak_lr),
        _large_locals(config.views),
    ]
    if isinstance(config, DINOConfig):
        verdicts += [_hot_teacher(config.teacher), _slow_teacher(config.teacher, plan)]
    return [verdict for verdict in verdicts if verdict]


def _short_epochs(config: DINOConfig | SiTConfig, plan: TrainingPlan) -> HealthWarning | None:
    spans = {"method.optimizer.warmup": config.optimizer.warmup}
    if isinstance(config, DINOConfig):
        spans |= {"method.teacher.warmup": config.teacher.warmup, "method.freeze_last_layer": config.freeze_last_layer}
    by_epoch = [f"{key}={span}" for key, span in spans.items() if span.unit == "epoch" and span.value > 0]
    if plan.steps_per_epoch >= SHORT_EPOCH or not by_epoch:
        return None
    steps = "1 step" if plan.steps_per_epoch == 1 else f"{plan.steps_per_epoch} steps"
    return HealthWarning(
        "short-epochs",
        f"an epoch is only {steps}, so {' and '.join(by_epoch)} may be over too soon",
        "Write the duration in steps or percent, as in method.optimizer.warmup=10%.",
    )


def _learning_rate(optimizer: OptimizerConfig, plan: TrainingPlan, peak: float) -> HealthWarning | None:
    low, high = LR_RANGE
    if low <= peak <= high:
        return None
    made_of = f"{optimizer.lr:g} x {plan.batch_size}/{optimizer.lr_batch_size} = {peak:.3g}"
    return HealthWarning(
        "learning-rate",
        f"a learning rate of {made_of} is too {'high' if peak > high else 'low'} for AdamW",
        f"Set method.optimizer.lr so that it lies between {low:g} and {high:g} after scaling.",
    )


def _large_locals(views: ViewsConfig) -> HealthWarning | None:
    small, large = views.local_crops, views.global_crops
    if not small.count or small.size <= large.size:
        return None
    return HealthWarning(
        "large-locals",
        f"local views of {small.size} pixels are larger than the global ones of {large.size}, and cost more than these",
        f"Set method.views.local_crops.size to about {large.size // 2}.",
    )


def _hot_teacher(teacher: TeacherConfig) -> HealthWarning | None:
    hottest = max(teacher.temperature, teacher.warmup_temperature)
    if hottest <= HOT_TEACHER:
        return None
    return HealthWarning(
        "hot-teacher",
        f"a teacher temperature of {hottest:g} is above {HOT_TEACHER}, where training tends to collapse",
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
    if plan.total_steps >= HALF_LIVES * half_life:
        return None
    return HealthWarning(
        "slow-teacher",
        f"with method.teacher.momentum={momentum:g} half of the teacher is older than {half_life:,.0f} steps, and the "
        f"run has {plan.total_steps:,}",
        "Lower it for a short run, as in 'method.teacher.momentum=[0.98,0.995]', or train longer.",
    )
