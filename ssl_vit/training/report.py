"""What a run says of itself on the terminal, before it begins and when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssl_vit.config import PretrainConfig
from ssl_vit.data.pictures import SkippedPictures
from ssl_vit.methods.base import Plan, SSLMethod, make_plan
from ssl_vit.training.health import Verdict
from ssl_vit.training.online import OnlineEvaluation
from ssl_vit.training.runs import Start
from ssl_vit.training.schedules import Schedule
from ssl_vit.training.skipping import SkippedSteps


def introduction(
    config: PretrainConfig,
    plan: Plan,
    method: SSLMethod,
    start: Start,
    verdicts: list[Verdict],
    online: OnlineEvaluation,
) -> str:
    """What is about to happen: data, network, length, health seen from here, and the schedules along the run."""
    size = sum(parameter.numel() for parameter in method.target.parameters()) / 1e6
    optimizer = config.method.optimizer
    lines = [
        f"{len(start.pictures):,} pictures, {plan.batch_size} per step, {plan.steps_per_epoch:,} steps per epoch, "
        f"{plan.total_steps:,} steps in all",
        f"{config.method.name} on {config.backbone.name}, {size:.1f} M parameters, run folder {config.run.path}",
        f"learning rate {optimizer.lr:g} x {plan.batch_size}/{optimizer.lr_batch_size} = {method.peak_lr:.3g}",
        *schedules_along(plan, method),
        *online.plan(),
        *(f"Health: {verdict}" for verdict in verdicts),
        *way_on(plan, method, start, make_plan(start.before, len(start.pictures))),
    ]
    return "\n".join(lines)


def schedules_along(plan: Plan, method: SSLMethod) -> list[str]:
    """Lines with the schedules from the first to the last step."""
    return schedule_table(method.schedules, [round(share * (plan.total_steps - 1)) for share in (0, 0.1, 0.5, 1)])


def way_on(plan: Plan, method: SSLMethod, start: Start, before: Plan) -> list[str]:
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


def conclusion(
    folder: Path,
    step: int,
    plan: Plan,
    verdict: Verdict | None,
    steps: SkippedSteps,
    skipped: SkippedPictures,
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
            f"{counted(steps.total, 'step')} had a loss or gradient that is not finite and were left out: "
            f"{steps.journal.path} names their pictures"
        )
    if count := skipped.count():
        lines.append(f"{counted(count, 'picture')} could not be read and left out: {skipped.path} names them")
    lines += online
    lines.append(f"Backbone: {folder / 'backbone.safetensors'} ({folder / 'backbone.json'} says how to load it)")
    return "\n".join(lines)


def counted(count: int, thing: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
