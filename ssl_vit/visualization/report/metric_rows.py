"""Metrics of a run's results, each with its baselines and with notes for the reader."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from ssl_vit.evaluation.results.eval_result import EvalResult, Metric
from ssl_vit.visualization.report.report_data import MetricRow
from ssl_vit.visualization.report.run_reader import RunContent


def metric_rows(run: RunContent) -> list[MetricRow]:
    """Return one row per metric, those of a result together; a result's warnings stand at its first main metric."""
    shown = None if run.loaded is None else run.loaded.backbone.state_sha256()
    count = Counter((result.task, result.data.name) for result in run.results)
    rows = []
    for result in run.results:
        notes = _model_notes(result, run, shown)
        solver = result.protocol.get("solver") if count[result.task, result.data.name] > 1 else None
        suffix = f", {solver.partition(',')[0]}" if isinstance(solver, str) else ""
        metrics = [metric for metric in result.score.metrics if metric.level != "detail"]
        warned = next(filter(result.is_main, metrics), metrics[0] if metrics else None)
        for metric in metrics:
            if not metric.is_number:
                continue
            chosen = ["selected on the test images, so too high"] if result.chosen_on_test(metric.name) else []
            remarks = [*notes, *chosen, metric.note, *(result.warnings if metric is warned else ())]
            rows.append(
                MetricRow(
                    task=result.task,
                    task_title=result.title or result.task,
                    metric=f"{metric.name}{suffix}",
                    title=(metric.title or metric.name) + suffix,
                    data=result.data.name,
                    **metric.model_dump(include={"value", "low", "high", "interval", "n"}),
                    baselines=_baselines(result, metric),
                    remark="; ".join(filter(None, remarks)),
                    result=result.path.relative_to(run.path).as_posix(),
                    level=_level(result, metric),
                )
            )
    return rows


def _level(result: EvalResult, metric: Metric) -> Literal["main", "further", "ground truth"]:
    if metric.level == "ground truth":
        return "ground truth"
    return "main" if result.is_main(metric) else "further"


def _baselines(result: EvalResult, metric: Metric) -> dict[str, float]:
    """Return the same metric of each baseline, or its IoU where it has no heads; upper bounds are excluded."""
    values = {}
    for score in result.baselines:
        by_name = {other.name: other for other in score.metrics}
        same = by_name.get(metric.name) or by_name.get("IoU")
        if same is not None and same.is_number and (same.name == metric.name or same.level == "score"):
            values[score.name] = same.value
    return values


def _model_notes(result: EvalResult, run: RunContent, shown: str | None) -> list[str]:
    """Return a note if the result is of another model than the one with the hash `shown`."""
    start, model, loaded = run.value("checkpoint"), result.model, run.loaded
    if start is not None and result.config.get("checkpoint") == start:  # the run's own test of what it has trained
        return [f"fine-tuned from {model.source}"]
    if loaded is None:
        return []
    same_file = model.sha256 == loaded.sha256 and model.weights in (None, loaded.weights)
    if model.state_sha256 == shown if model.state_sha256 else same_file:
        return []
    if model.weights not in (None, loaded.weights):
        return [f"of the {model.weights}'s weights, and this page shows the {loaded.weights or 'exported'} ones"]
    after = "" if model.step is None else f", after {model.step:,} steps"
    return [f"of another checkpoint than this page shows{after}: measure again"]
