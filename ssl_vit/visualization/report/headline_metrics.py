"""Metrics of a run's results, each beside its baselines, with notes for the reader."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ssl_vit.evaluation.results.eval_result import EvalResult, Metric
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.visualization.report.schema import MetricRow, Rank

ORDER = ("knn", "linear", "finetune", "attention", "fewshot", "transfer")


def headlines_of(records: list[EvalResult], loaded: LoadedBackbone | None, folder: Path) -> list[MetricRow]:
    """One per number, those of an evaluation together; its warnings stand at the first in sight.

    Args:
        records: Of the run.
        loaded: The model that the report shows.
        folder: Of the run.
    """
    ranks = {task: rank for rank, task in enumerate(ORDER)}
    ordered = sorted(records, key=lambda record: ranks.get(record.task, len(ORDER)))
    shown = None if loaded is None else loaded.backbone.state_sha256()
    alike = Counter((record.task, record.data.name) for record in records)
    headlines = []
    for record in ordered:
        remarks = _of_model(record, loaded, shown)
        solver = record.protocol.get("solver") if alike[record.task, record.data.name] > 1 else None
        told_apart = f", {solver.partition(',')[0]}" if isinstance(solver, str) else ""
        ranks_of = {metric.name: _rank(record, metric) for metric in record.score.metrics if metric.level != "detail"}
        warned = next((name for name, rank in ranks_of.items() if rank == Rank.MAIN), next(iter(ranks_of), None))
        for metric in record.score.metrics:
            if not metric.is_number or metric.level == "detail":
                continue
            notes = ["selected on the test images, so too high"] if record.chosen_on_test(metric.name) else []
            notes += [metric.note] if metric.note else []
            headlines.append(
                MetricRow(
                    task=record.task,
                    metric=f"{metric.name}{told_apart}",
                    data=record.data.name,
                    value=metric.value,
                    low=metric.low,
                    high=metric.high,
                    interval=metric.interval,
                    n=metric.n,
                    baselines=_baselines(record, metric),
                    remark="; ".join([*remarks, *notes, *(record.warnings if metric.name == warned else ())]),
                    record=record.path.relative_to(folder).as_posix(),
                    title=(metric.title or metric.name) + told_apart,
                    rank=ranks_of[metric.name],
                )
            )
    return headlines


def _rank(record: EvalResult, metric: Metric) -> Rank:
    if metric.level == "ground truth":
        return Rank.GIVEN
    return Rank.MAIN if record.is_main(metric) else Rank.FURTHER


def _baselines(record: EvalResult, metric: Metric) -> dict[str, float]:
    """Return the same metric of each baseline, or its IoU where it has no heads; upper bounds are excluded."""
    values = {}
    for score in record.baselines:
        by_name = {other.name: other for other in score.metrics}
        same = by_name.get(metric.name) or by_name.get("IoU")
        if same is not None and same.is_number and (same.name == metric.name or same.level == "score"):
            values[score.name] = same.value
    return values


def _of_model(record: EvalResult, loaded: LoadedBackbone | None, shown: str | None) -> list[str]:
    """Return a note if the result is of another model than the one that the report shows."""
    if record.task == "finetune":  # whose record names the model that it began with
        return [f"fine-tuned from {record.model.source}"]
    if loaded is None:
        return []
    same_file = record.model.sha256 == loaded.sha256 and record.model.weights in (None, loaded.weights)
    if record.model.state_sha256 == shown if record.model.state_sha256 else same_file:
        return []
    if record.model.weights not in (None, loaded.weights):
        return [f"of the {record.model.weights}'s weights, and this page shows the {loaded.weights or 'exported'} ones"]
    after = "" if record.model.step is None else f", after {record.model.step:,} steps"
    return [f"of another checkpoint than this page shows{after}: measure again"]
