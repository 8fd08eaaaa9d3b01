"""Comparison of several models: rows are models, columns are metrics of one task, protocol and dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_vit.evaluation.results.eval_result import Change, EvalResult, Metric, ModelScores, Predictions
from ssl_vit.evaluation.results.result_reader import read_predictions
from ssl_vit.evaluation.results.statistics import Difference, holm, paired_difference
from ssl_vit.runtime.errors import UserError


class Group(NamedTuple):
    """One task and protocol on one dataset."""

    task: str
    data: str
    variant: int  # counted from 1 where several protocols or datasets are mixed, else 0

    def __str__(self) -> str:
        return f"{self.task} on {self.data}" + (f" [{self.variant}]" if self.variant else "")


class Column(NamedTuple):
    """The header of a column."""

    group: Group
    metric: str


Cells = dict[Column, Metric]
Latest = dict[tuple[str, Group], EvalResult]  # by the model's name


class Row(NamedTuple):
    """One model or baseline."""

    name: str
    cells: Cells
    baseline: bool


class Paired(NamedTuple):
    """A model against the first one, on the same images."""

    column: Column
    name: str
    first: str
    difference: Difference
    adjusted: float  # p by Holm's method, for all pairs of the comparison


class Comparison(NamedTuple):
    """Everything that a table shows."""

    columns: list[Column]
    rows: list[Row]
    paired: list[Paired]
    optimistic: set[Column]  # selected on the test images: too high
    notes: list[str]


def compare(results: Sequence[EvalResult], *, mix: bool) -> Comparison:
    """Put results side by side, in the order of the rows, and test each model against the first.

    With `mix` results of one task and dataset that have different protocols or images get columns of their own.

    Raises:
        UserError: There are such results, and `mix` is False.
    """
    variants = _variants(results)
    mixed = {f"{task} on {data}": kinds for (task, data), kinds in variants.items() if len(kinds) > 1}
    if mixed and not mix:
        texts = [f"{name}: {_differing(kinds)}" for name, kinds in mixed.items()]
        raise UserError(
            "these results do not belong in one column:\n  "
            + "\n  ".join(texts)
            + "\nEvaluate the models with the same settings, or use mix=true to show separate columns."
        )
    notes = [f"[1] to [{len(kinds)}] of {name}: {_differing(kinds)}" for name, kinds in mixed.items()]
    names = _model_names(results)
    latest: Latest = {}
    for result in results:
        kinds = variants[result.task, result.data.name]
        variant = next(number for number, kind in enumerate(kinds, 1) if result.same_setting(kind))
        key = (names[result.id], Group(result.task, result.data.name, variant if len(kinds) > 1 else 0))
        if key in latest:
            notes.append(f"several results of {key[0]} for {key[1]}: the latest is shown")
        latest[key] = max(latest.get(key, result), result, key=lambda one: one.created)
    cells: dict[str, Cells] = defaultdict(dict)
    optimistic = set()
    for (name, group), result in latest.items():
        own = _cells(group, result.score.metrics)
        cells[name] |= own
        optimistic |= {column for column in own if result.chosen_on_test(column.metric)}
    columns: dict[Group, dict[Column, None]] = defaultdict(dict)  # the metrics of one group side by side
    for column in (column for own in cells.values() for column in own):
        columns[column.group][column] = None
    rows = [Row(name, own, baseline=False) for name, own in cells.items()]
    paired, missing = _pairs(latest)
    notes += [*missing, *_precision_notes(latest), *_warnings(latest)]
    ordered = [column for group in columns.values() for column in group]
    return Comparison(ordered, rows + _baselines(latest), paired, optimistic, notes)


def _cells(group: Group, metrics: Sequence[Metric]) -> Cells:
    return {Column(group, metric.name): metric for metric in metrics}


def _variants(results: Sequence[EvalResult]) -> dict[tuple[str, str], list[EvalResult]]:
    """Return one result of each protocol and dataset, by task and name of the data."""
    variants: dict[tuple[str, str], list[EvalResult]] = defaultdict(list)
    for result in results:
        kinds = variants[result.task, result.data.name]
        if not any(result.same_setting(kind) for kind in kinds):
            kinds.append(result)
    return variants


def _differing(kinds: list[EvalResult]) -> str:
    """List the keys in which protocols and images differ, with their values in the order of the columns."""
    items = [kind.protocol_items for kind in kinds]
    keys = dict.fromkeys(key for one in items for key in one)
    differing = [key for key in keys if len({one.get(key) for one in items}) > 1]
    texts = [f"{key}: {' | '.join(_shorten(one.get(key, 'none')) for one in items)}" for key in differing]
    return "; ".join(texts) or "their protocol hashes"


def _shorten(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _model_names(results: Sequence[EvalResult]) -> dict[str, str]:
    """Return the name of each result's model by the result's id, with a hash where one name has several weights."""
    hashes: dict[str, set[str | None]] = defaultdict(set)
    for result in results:
        hashes[result.model.name].add(result.model.identity)
    return {
        result.id: result.model.name
        if len(hashes[result.model.name]) == 1
        else f"{result.model.name} ({(result.model.identity or 'no file')[:8]})"
        for result in results
    }


def _baselines(latest: Latest) -> list[Row]:
    """Return a row for each baseline, or for each model's where those of several models differ."""
    values: dict[str, dict[str, Cells]] = defaultdict(lambda: defaultdict(dict))
    for (name, group), result in latest.items():
        for score in result.baselines:
            values[score.name][name] |= _cells(group, score.metrics)
    rows = []
    for baseline, by_model in values.items():
        merged = {column: cell for own in by_model.values() for column, cell in own.items()}
        if all(merged[column] == cell for own in by_model.values() for column, cell in own.items()):
            rows.append(Row(baseline, merged, baseline=True))
        else:
            rows += [Row(f"{baseline} of {name}", own, baseline=True) for name, own in by_model.items()]
    return rows


def _pairs(latest: Latest) -> tuple[list[Paired], list[str]]:
    """Test every model against the first one of its group by top-1; also return why some are not tested."""
    groups: dict[Group, list[tuple[str, EvalResult]]] = defaultdict(list)
    for (name, group), result in latest.items():
        groups[group].append((name, result))
    pairs: list[tuple[Column, str, str, Difference]] = []
    notes: list[str] = []
    for group, ((first, base), *others) in groups.items():
        for metric in base.score.metrics:
            if metric.name.partition(",")[0] != "top-1" or not others:
                continue
            if metric.over_subsets:
                notes.append(f"{group}: no paired tests of means over subsets")
                continue
            if any(result.chosen_on_test(metric.name) for _, result in groups[group]):
                notes.append(f"{group}: no paired test of {metric.name}, which was selected on the test images")
                continue
            for name, result in others:
                difference = _difference(base, result, metric.name.removeprefix("top-1"))
                if isinstance(difference, Difference):
                    pairs.append((Column(group, metric.name), name, first, difference))
                else:
                    notes.append(f"no paired test of {name} and {first} for {group}: {difference}")
    adjusted = holm([difference.p for *_, difference in pairs])
    return [Paired(*pair, p) for pair, p in zip(pairs, adjusted, strict=True)], list(dict.fromkeys(notes))


def _difference(first: EvalResult, second: EvalResult, suffix: str) -> Difference | str:
    """Compare two results on the images that both have predictions for, or return why that is not possible."""
    both = []
    for result in (first, second):
        predictions = read_predictions(result, suffix)
        if predictions is None:
            return f"{result.path} lacks its predictions ({result.predictions_file or 'an npz beside it'})"
        both.append(predictions)
    one, other = both
    _, rows, other_rows = np.intersect1d(one.indices.numpy(), other.indices.numpy(), return_indices=True)
    if not len(rows):
        return "they have no image in common"
    return paired_difference(one.rank[torch.from_numpy(rows)] == 0, other.rank[torch.from_numpy(other_rows)] == 0)


def _precision_notes(latest: Latest) -> list[str]:
    """Note groups whose models were computed in different dtypes."""
    groups: dict[Group, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (name, group), result in latest.items():
        if dtype := result.environment.get("forward"):
            groups[group][str(dtype)].append(name)
    notes = []
    for group, dtypes in groups.items():
        if len(dtypes) > 1:
            text = " and ".join(f"{dtype} ({', '.join(names)})" for dtype, names in dtypes.items())
            notes.append(f"{group}: the models were computed in {text}; rounding is part of their difference")
    return notes


def _warnings(latest: Latest) -> list[str]:
    """List each warning of the results once, with its models."""
    models: dict[tuple[Group, str], list[str]] = defaultdict(list)
    for (name, group), result in latest.items():
        for text in dict.fromkeys(result.warnings):
            models[group, text].append(name)
    return [f"warning, {group}, {', '.join(names)}: {text}" for (group, text), names in models.items()]


def changes_since_start(scores: Sequence[ModelScores], *, start: str) -> list[Change]:
    """Return how top-1 of the first scores changed since the baseline called `start`; nothing without it."""
    predictions: dict[str, Predictions] = next((score.predictions for score in scores if score.name == start), {})
    changes = []
    for suffix, now in scores[0].predictions.items():
        if before := predictions.get(suffix):
            changes.append(paired_change(f"top-1{suffix}", before.rank == 0, now.rank == 0))
    return changes


def paired_change(metric: str, before: Tensor, after: Tensor) -> Change:
    """Return the change of an accuracy by which of the same images are classified correctly, (n,) bool each."""
    found = paired_difference(before, after)
    first, last = (each.float().mean().item() for each in (before, after))
    return Change(metric=metric, before=first, after=last, low=found.low, high=found.high, p=found.p)
