"""Text that a run prints before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.schedules import Schedule
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.run_dir import RunState


def start_summary(
    run: RunState, method: SSLMethod, *, images: Sequence[str], model: str, notes: Sequence[str] = ()
) -> str:
    """Return the text before the first step: data, length, model, learning rate, schedules, and the resumed state.

    The length stands at the end of the first line about the images; the notes come after the schedules.
    """
    plan, optimizer = run.plan, method.config.optimizer
    epoch, total = pluralize(plan.steps_per_epoch, "step"), pluralize(plan.total_steps, "step")
    parameters = sum(parameter.numel() for parameter in method.eval_backbone.parameters())
    layer_decay = getattr(method.config, "layer_decay", None)
    lines = [
        f"{images[0]}, {plan.batch_size} per step, {epoch} per epoch, {total} in total",
        *images[1:],
        f"{model}, {parameters / 1e6:.1f} M parameters, run directory {run.path}",
        f"learning rate {optimizer.lr:g} x {plan.batch_size}/{optimizer.lr_batch_size} = {method.peak_lr:.3g}"
        + (f" at the head, x {layer_decay:g} per layer below" if layer_decay else ""),
        *schedule_table(method.schedules, [round(share * (plan.total_steps - 1)) for share in (0, 0.1, 0.5, 1)]),
        *notes,
        *resume_summary(run, method),
    ]
    return "\n".join(lines)


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
