"""Check the training config for likely problems before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ssl_vit.config.methods import MethodConfig, TeacherConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.config.types import Duration, StrictConfig
from ssl_vit.methods.backbone_rates import BackboneRates, published_backbone_lr
from ssl_vit.methods.health import HealthWarning
from ssl_vit.methods.schedules import TrainingPlan, first_momentum
from ssl_vit.runtime.text import pluralize

SHORT_EPOCH = 50  # steps; a warm-up of 10 epochs of one step each is over at once
LR_RANGE = 1e-6, 1e-2  # of AdamW on vision transformers, after scaling; published recipes use 1e-4 to 8e-3
MAX_TEACHER_TEMPERATURE = 0.07  # DINO's highest; above it training tends to collapse to the uniform assignment
MIN_HALF_LIVES = 5  # of the teacher's average that a run should last
SHORT_RUN_MOMENTUM = 0.9, 0.98  # lowest and highest start that is proposed for a short run
MAX_BACKBONE_LR = 2  # times the highest of published continued trainings; recipes for random weights have 5 times
MAX_DROP_PATH = 0.1  # on weights that exist; recipes for random ones have up to 0.4
MAX_WEIGHT_DECAY = 0.1  # as before; published continued trainings keep 0.04


class StartFacts(NamedTuple):
    """What a run from weights took from its source; None where that is unknown, as it is on resume."""

    new_heads: bool | None
    normalization: tuple[list[float], list[float]] | None  # mean and std


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


def check_start(
    config: PretrainConfig, plan: TrainingPlan, rates: BackboneRates | None, peak_lr: float, facts: StartFacts
) -> list[HealthWarning]:
    """Return warnings about the config of a run from weights whose features it may destroy; none of another run."""
    if rates is None:
        return []
    return [*_check_heads(config, plan, rates, facts), *_check_backbone(config, plan, rates, peak_lr, facts)]


def _check_heads(
    config: PretrainConfig, plan: TrainingPlan, rates: BackboneRates, facts: StartFacts
) -> Iterator[HealthWarning]:
    if not facts.new_heads:
        return
    if not rates.frozen_steps:
        yield HealthWarning(
            "random-heads",
            "the heads are new, and the backbone learns from them from the first step",
            "Set start.freeze_backbone=15%, so that the heads learn first.",
        )
    last_layer = getattr(config.method, "freeze_last_layer", None)
    frozen = last_layer.steps(plan.steps_per_epoch, plan.total_steps) if last_layer else 0
    if frozen > rates.frozen_steps:
        yield HealthWarning(
            "frozen-last-layer",
            f"method.freeze_last_layer={last_layer} keeps new prototypes at random values for {frozen:,} steps, and "
            f"the backbone learns from them from step {rates.frozen_steps:,} on",
            "Set method.freeze_last_layer=0steps, or a longer start.freeze_backbone.",
        )


def _check_backbone(
    config: PretrainConfig, plan: TrainingPlan, rates: BackboneRates, peak_lr: float, facts: StartFacts
) -> Iterator[HealthWarning]:
    lr = max(rates.scales.values()) * peak_lr
    most = MAX_BACKBONE_LR * published_backbone_lr(plan.batch_size)
    few_change = config.start.trainable == "norms" or config.start.lora_rank  # which take higher rates
    if lr > most and config.start.backbone_lr != "auto" and not few_change:
        yield HealthWarning(
            "high-backbone-lr",
            f"the backbone's learning rate of {lr:.3g} is for training from scratch; on weights that exist, published "
            f"trainings with a batch of {plan.batch_size:,} have up to {most / MAX_BACKBONE_LR:.3g}",
            "Set start.backbone_lr=auto.",
        )
    first, last = config.method.optimizer.weight_decay
    if max(first, last) > MAX_WEIGHT_DECAY:
        yield HealthWarning(
            "high-weight-decay",
            f"a weight decay of {first:g} to {last:g} pulls apart what the weights know",
            "Set 'method.optimizer.weight_decay=[0.04,0.04]'.",
        )
    if config.backbone.drop_path > MAX_DROP_PATH:
        yield HealthWarning(
            "high-drop-path",
            f"backbone.drop_path={config.backbone.drop_path:g} is for training from scratch",
            f"Set backbone.drop_path={MAX_DROP_PATH:g}, or 0.",
        )
    views = config.method.views
    source = facts.normalization
    if source and len(source[0]) == len(views.mean) and source != (views.mean, views.std):
        yield HealthWarning(
            "other-normalization",
            f"images are normalized by mean {views.mean} and std {views.std}; those that the weights know, by mean "
            f"{source[0]} and std {source[1]}",
            "Leave out method.views.mean and .std, which are then those of the weights.",
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
