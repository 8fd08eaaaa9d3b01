"""Text that a run prints before it starts and when it has ended."""

from __future__ import annotations

from collections.abc import Sequence

from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.health import HealthWarning
from ssl_vit.methods.schedules import Schedule, TrainingPlan
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.finetune_source import Splits
from ssl_vit.training.run_dir import RunState


def pretrain_summary(
    config: PretrainConfig, run: RunState, method: SSLMethod, warnings: Sequence[HealthWarning], online: Sequence[str]
) -> str:
    """Return the text before the first step: data, model, length, health warnings and schedules."""
    lines = [
        f"{pluralize(len(run.train), 'image')}, {length_summary(run.plan)}",
        f"{config.method.name} on {config.backbone.name}, {parameter_summary(method)}, run directory {run.path}",
        lr_summary(method),
        *preview_schedules(run.plan, method),
        *online,
        *(f"Health: {warning}" for warning in warnings),
        *resume_summary(run, method),
    ]
    return "\n".join(lines)


def length_summary(plan: TrainingPlan) -> str:
    """Return `64 per step, 12 steps per epoch, 1,200 steps in total`."""
    epoch, total = pluralize(plan.steps_per_epoch, "step"), pluralize(plan.total_steps, "step")
    return f"{plan.batch_size} per step, {epoch} per epoch, {total} in total"


def parameter_summary(method: SSLMethod) -> str:
    """Return the size of the backbone."""
    return f"{sum(parameter.numel() for parameter in method.eval_backbone.parameters()) / 1e6:.1f} M parameters"


def lr_summary(method: SSLMethod) -> str:
    """Return the line about the peak learning rate."""
    optimizer, batch_size = method.config.optimizer, method.plan.batch_size
    return f"learning rate {optimizer.lr:g} x {batch_size}/{optimizer.lr_batch_size} = {method.peak_lr:.3g}"


def preview_schedules(plan: TrainingPlan, method: SSLMethod) -> list[str]:
    """Return a table of the schedules from the first to the last step."""
    return schedule_table(method.schedules, [round(share * (plan.total_steps - 1)) for share in (0, 0.1, 0.5, 1)])


def resume_summary(run: RunState, method: SSLMethod) -> list[str]:
    """Return lines about the resumed state, and how an extension changes the schedules."""
    lines, plan, before = list(run.notes), run.plan, run.previous_plan
    if run.done:
        resumes = run.done < plan.total_steps
        lines.append(f"Resuming after step {run.done:,}" if resumes else "The run is already complete")
    if before and before.total_steps != plan.total_steps:
        lines.append(
            f"The run was {before.total_steps:,} steps long and is now {plan.total_steps:,}. Its schedules jump to "
            "those of the longer run; before:"
        )
        old = type(method).make_schedules(method.config, before)
        points = [run.done, before.total_steps - 1, plan.total_steps - 1]
        lines += [*schedule_table(old, points), "and now:", *schedule_table(method.schedules, points)]
    return lines


def schedule_table(schedules: dict[str, Schedule], points: list[int]) -> list[str]:
    """Return lines with the values of schedules at some steps, each of which is shown once."""
    points = sorted(set(points))
    lines = [f"  {'at step':<20}" + "".join(f"{point:>10,}" for point in points)]
    for name, schedule in schedules.items():
        lines.append(f"  {name:<20}" + "".join(f"{schedule(point):>10.3g}" for point in points))
    return lines


def skipped_images_summary(skipped: SkippedImageLog) -> list[str]:
    """Return a line about the images that could not be read, if there are any."""
    count = skipped.count()
    return [f"{pluralize(count, 'image')} could not be read: {skipped.path} lists the skipped images"] if count else []


def finetune_summary(run: RunState, method: SSLMethod, splits: Splits, *, start: str) -> str:
    """Return the text before the first step of fine-tuning; `start` is what it starts from."""
    decay = getattr(method.config, "layer_decay", 1)
    lines = [
        f"{pluralize(len(splits.train), 'image')} of {len(run.dataset.classes)} classes, {length_summary(run.plan)}",
        f"{len(splits.val):,} val images, {len(splits.test):,} test images ({splits.rule})",
        f"fine-tuning {start}, {parameter_summary(method)}, run directory {run.path}",
        f"{lr_summary(method)} at the head, x {decay:g} per layer below",
        *preview_schedules(run.plan, method),
        *resume_summary(run, method),
    ]
    return "\n".join(lines)
