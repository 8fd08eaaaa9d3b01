"""The numbers of a run's records, each beside its baselines, with what a reader must know of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ssl_vit.evaluation.results.result_reader import SavedMetric, SavedResult, SavedScore
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.visualization.report.schema import MetricRow, Rank

CEILING = "patch ceiling"  # what the attention command calls it
KNN = "top-1, k=20"
HEADS = {"fixed head": "best fixed head", "mean": "heads’ mean", "oracle head": "each image’s best head"}
OWN_MASKS = ("mass/mean", "mass/fixed head", "tokencut")
ORDER = ("knn", "linear", "finetune", "attention", "fewshot", "transfer")


def headlines_of(records: list[SavedResult], loaded: LoadedBackbone | None, folder: Path) -> list[MetricRow]:
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
        ranks_of = {
            metric.name: _rank(record, metric.name) for metric in record.score.metrics if _is_shown(record, metric)
        }
        warned = next((name for name, rank in ranks_of.items() if rank == Rank.MAIN), next(iter(ranks_of), None))
        for metric in record.score.metrics:
            if metric.value is None or metric.low is None or metric.high is None or not _is_shown(record, metric):
                continue
            headlines.append(
                MetricRow(
                    task=record.task,
                    metric=f"{'IoU, ' if record.task == 'attention' else ''}{metric.name}{told_apart}",
                    data=record.data.name,
                    value=metric.value,
                    low=metric.low,
                    high=metric.high,
                    interval=metric.interval,
                    n=metric.n,
                    baselines=_baselines(record, metric),
                    remark="; ".join(
                        [*remarks, *_of_metric(record, metric), *(record.warnings if metric.name == warned else ())]
                    ),
                    record=record.path.relative_to(folder).as_posix(),
                    title=_in_words(record, metric.name) + told_apart,
                    rank=ranks_of[metric.name],
                )
            )
    return headlines


def _is_shown(record: SavedResult, metric: SavedMetric) -> bool:
    """Top-5, and the measures of masks beside their IoU, stay in the records."""
    _, space, measure = metric.name.rpartition(" ")
    measures = {other.name for score in record.baselines for other in score.metrics}
    return not (metric.name.startswith("top-5") or (record.task == "attention" and space and measure in measures))


def _in_words(record: SavedResult, name: str) -> str:
    """What a metric is; a name of attention masks is `rule/head` or that of a method."""
    if record.task != "attention":
        return name
    rule, _, head = name.partition("/")
    mass = record.protocol.get("attention_mass")
    share = f"{100 * mass:g} %" if isinstance(mass, float | int) else "a share"
    rules = {
        "mass": f"masks with {share} of the attention",
        "area": "masks as large as the object (its size given)",
        "object": "masks of each object by itself",
    }
    return f"{rules[rule]}: {HEADS.get(head, head)}" if rule in rules else f"masks by {name}"


def _rank(record: SavedResult, name: str) -> Rank:
    """In sight are kNN with 20 neighbors, the fewest and the most labels, masks that a model makes by itself."""
    shown = [metric.name for metric in record.score.metrics if _is_shown(record, metric)]
    if record.task == "attention":
        if name.startswith("area/") or name.endswith("/oracle head"):
            return Rank.GIVEN
        main = [own for own in OWN_MASKS if own in shown] or shown
    elif record.task == "fewshot":
        alike = [other for other in shown if other.rpartition(", ")[2] == shown[0].rpartition(", ")[2]]
        main = [alike[0], alike[-1]]
    elif record.task == "knn":
        main = [KNN] if KNN in shown else shown[:1]
    else:
        main = shown
    return Rank.MAIN if name in main else Rank.FURTHER


def _baselines(record: SavedResult, metric: SavedMetric) -> dict[str, float]:
    """By name the same metric of the others; of those that have no heads, their IoU. A ceiling is none of them."""
    found = {score.name: _same(score, metric.name) for score in record.baselines if score.name != CEILING}
    return {name: value for name, value in found.items() if value is not None}


def _same(score: SavedScore, name: str) -> float | None:
    values = {metric.name: metric.value for metric in score.metrics}
    return values.get(name, values.get("IoU"))


def _of_model(record: SavedResult, loaded: LoadedBackbone | None, shown: str | None) -> list[str]:
    """A word where the model is not the one that the report shows."""
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


def _of_metric(record: SavedResult, metric: SavedMetric) -> list[str]:
    """What the protocol says of this number in particular."""
    said = ["chosen by the test images, so too high"] if record.chosen_on_test(metric.name) else []
    if record.task == "attention":
        head = metric.name.rpartition("/")[2]
        note = record.protocol.get(head)
        said += [note] if isinstance(note, str) and head != "mean" else []
        ceilings = [_same(score, "IoU") for score in record.baselines if score.name == CEILING]
        said += [f"no mask of such patches reaches more than {ceiling:.2f}" for ceiling in ceilings if ceiling]
    return said
