"""What a run says of itself on the terminal, before it begins and when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.health import HealthWarning
from ssl_vit.methods.schedules import Schedule, TrainingPlan, make_plan
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.callbacks.online_eval import OnlineEval
from ssl_vit.training.callbacks.skipped_steps import SkippedSteps
from ssl_vit.training.run_dir import RunState


def startup_summary(
    config: PretrainConfig,
    plan: TrainingPlan,
    method: SSLMethod,
    start: RunState,
    verdicts: list[HealthWarning],
    online: OnlineEval,
) -> str:
    """What is about to happen: data, model, length, health seen from here, and the schedules along the run."""
    size = sum(parameter.numel() for parameter in method.eval_backbone.parameters()) / 1e6
    optimizer = config.method.optimizer
    lines = [
        f"{len(start.dataset):,} images, {plan.batch_size} per step, {plan.steps_per_epoch:,} steps per epoch, "
        f"{plan.total_steps:,} steps in all",
        f"{config.method.name} on {config.backbone.name}, {size:.1f} M parameters, run folder {config.run.path}",
        f"learning rate {optimizer.lr:g} x {plan.batch_size}/{optimizer.lr_batch_size} = {method.peak_lr:.3g}",
        *preview_schedules(plan, method),
        *online.plan(),
        *(f"Health: {verdict}" for verdict in verdicts),
        *resume_summary(plan, method, start, make_plan(start.before, len(start.dataset))),
    ]
    return "\n".join(lines)


def preview_schedules(plan: TrainingPlan, method: SSLMethod) -> list[str]:
    """Lines with the schedules from the first to the last step."""
    return schedule_table(method.schedules, [round(share * (plan.total_steps - 1)) for share in (0, 0.1, 0.5, 1)])


def resume_summary(plan: TrainingPlan, method: SSLMethod, start: RunState, before: TrainingPlan) -> list[str]:
    """Lines on what goes on, and on what has changed since `before`, the plan that the run has had so far."""
    lines = list(start.notes)
    if start.done:
        going_on = start.done < plan.total_steps
        lines.append(f"Going on after step {start.done:,}" if going_on else "The run is complete already")
    if before.total_steps != plan.total_steps:
        lines.append(f"The run was {before.total_steps:,} steps long and is now {plan.total_steps:,}. Its schedules")
        lines.append("jump here to where those of the longer run are; before:")
        old = type(method).make_schedules(method.config, before)
        points = [start.done, before.total_steps - 1, plan.total_steps - 1]
        lines += [*schedule_table(old, points), "and now:", *schedule_table(method.schedules, points)]
    return lines


def schedule_table(schedules: dict[str, Schedule], points: list[int]) -> list[str]:
    """Lines with the schedules' values at some steps."""
    lines = [f"  {'at step':<20}" + "".join(f"{point:>10,}" for point in points)]
    for name, schedule in schedules.items():
        lines.append(f"  {name:<20}" + "".join(f"{schedule(point):>10.3g}" for point in points))
    return lines


def final_summary(
    folder: Path,
    step: int,
    plan: TrainingPlan,
    verdict: HealthWarning | None,
    steps: SkippedSteps,
    skipped: SkippedImageLog,
    online: Sequence[str],
) -> str:
    """Where things are, and whatever was not as it should be."""
    lines = []
    if step < plan.total_steps:
        lines.append(
            f"Stopped and saved after step {step:,} of {plan.total_steps:,}; the same command with "
            "run.resume=true goes on from there."
        )
    if verdict:
        lines.append(f"Health: {verdict}")
    if steps.total:
        lines.append(
            f"{pluralize(steps.total, 'step')} had a loss or gradient that is not finite and were left out: "
            f"{steps.journal.path} names their images"
        )
    if count := skipped.count():
        lines.append(f"{pluralize(count, 'image')} could not be read and left out: {skipped.path} names them")
    lines += online
    lines.append(f"Backbone: {folder / 'backbone.safetensors'} ({folder / 'backbone.json'} says how to load it)")
    return "\n".join(lines)
