"""Several models side by side: rows are models, columns are metrics of one task, protocol and dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ssl_vit.evaluation.results.result_reader import SavedMetric, SavedResult, read_answers
from ssl_vit.evaluation.results.statistics import Difference, difference, holm
from ssl_vit.runtime.errors import UserError


class Group(NamedTuple):
    """One way of measuring on one dataset."""

    task: str
    data: str
    variant: int  # from 1, where several protocols or datasets are mixed; else 0

    def __str__(self) -> str:
        return f"{self.task} on {self.data}" + (f" [{self.variant}]" if self.variant else "")


class Column(NamedTuple):
    """What is written above a column of the table."""

    group: Group
    metric: str


Latest = dict[tuple[str, Group], SavedResult]  # by the model's name


class Row(NamedTuple):
    """One model, or one baseline."""

    name: str
    cells: dict[Column, SavedMetric]
    baseline: bool


class Paired(NamedTuple):
    """A model against the first one, on the same images."""

    column: Column
    name: str
    first: str
    found: Difference
    corrected: float  # p by Holm's method, for all that stand in the same comparison


class Comparison(NamedTuple):
    """Everything that is shown."""

    columns: list[Column]
    rows: list[Row]
    paired: list[Paired]
    optimistic: set[Column]  # chosen by the test images: too high
    notes: list[str]

    def best(self, column: Column) -> float | None:
        """The highest value of a column, if several models are in it."""
        cells = [row.cells[column] for row in self.rows if not row.baseline and column in row.cells]
        values = [cell.value for cell in cells if cell.value is not None]
        return max(values) if len(values) > 1 else None


def compare(records: Sequence[SavedResult], *, mix: bool) -> Comparison:
    """Put records side by side; the first of them is what the others are held against.

    Args:
        records: In the order of the rows.
        mix: Show results of one task and data set that came about by different protocols, or of different images,
            in columns of their own.

    Raises:
        UserError: There are such, and they were not to be mixed.
    """
    variants = _variants(records)
    mixed = {key: kinds for key, kinds in variants.items() if len(kinds) > 1}
    if mixed and not mix:
        texts = [f"{task} on {data}: {_differing(kinds)}" for (task, data), kinds in mixed.items()]
        raise UserError(
            "these results do not belong in one column:\n  "
            + "\n  ".join(texts)
            + "\nmeasure them in the same way, or show them in columns of their own with mix=true"
        )
    names = _names(records)
    notes = [f"[1] to [{len(kinds)}] of {task} on {data}: {_differing(kinds)}" for (task, data), kinds in mixed.items()]
    latest: Latest = {}
    for record in records:
        kinds = variants[record.task, record.data.name]
        variant = next(place for place, kind in enumerate(kinds, 1) if _same(record, kind))
        key = (names[record.id], Group(record.task, record.data.name, variant if len(kinds) > 1 else 0))
        if key in latest:
            notes.append(f"several records of {key[0]} for {key[1]}: the latest counts")
        latest[key] = max(latest.get(key, record), record, key=lambda one: one.created)
    cells: dict[str, dict[Column, SavedMetric]] = defaultdict(dict)
    for (name, group), record in latest.items():
        cells[name] |= {Column(group, metric.name): metric for metric in record.score.metrics}
    rows = [Row(name, own, baseline=False) for name, own in cells.items()]
    paired, missing = _pairs(latest)
    notes += [*missing, *_roundings(latest), *_warnings(latest)]
    optimistic = {
        Column(group, metric.name)
        for (_, group), record in latest.items()
        for metric in record.score.metrics
        if record.chosen_on_test(metric.name)
    }
    return Comparison(_ordered(cells.values()), rows + _baselines(latest), paired, optimistic, notes)


def _ordered(rows: Iterable[Mapping[Column, SavedMetric]]) -> list[Column]:
    """Metrics of one group side by side, groups in the order in which they first come."""
    metrics: dict[Group, dict[Column, None]] = defaultdict(dict)
    for column in (column for row in rows for column in row):
        metrics[column.group][column] = None
    return [column for columns in metrics.values() for column in columns]


def _variants(records: Sequence[SavedResult]) -> dict[tuple[str, str], list[SavedResult]]:
    """Per task and name of the data one record of each protocol and dataset that there is."""
    variants: dict[tuple[str, str], list[SavedResult]] = defaultdict(list)
    for record in records:
        kinds = variants[record.task, record.data.name]
        if not any(_same(record, kind) for kind in kinds):
            kinds.append(record)
    return variants


def _same(one: SavedResult, other: SavedResult) -> bool:
    return one.protocol_hash == other.protocol_hash and one.data.identity() == other.data.identity()


def _differing(kinds: list[SavedResult]) -> str:
    """The keys in which the protocols, and the images, differ, with their values in the order of the columns."""
    told = [kind.told for kind in kinds]
    keys = dict.fromkeys(key for one in told for key in one)
    differing = [key for key in keys if len({one.get(key) for one in told}) > 1]
    texts = [f"{key}: {' | '.join(_shortened(one.get(key, 'none')) for one in told)}" for key in differing]
    return "; ".join(texts) or "their protocol hashes"


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _names(records: Sequence[SavedResult]) -> dict[str, str]:
    """What each record's model is called, by the record's id; of one name with other weights by their hash, too."""
    hashes: dict[str, set[str | None]] = defaultdict(set)
    for record in records:
        hashes[record.model.name].add(record.model.identity)
    return {
        record.id: record.model.name
        if len(hashes[record.model.name]) == 1
        else f"{record.model.name} ({(record.model.identity or 'no file')[:8]})"
        for record in records
    }


def _baselines(latest: Latest) -> list[Row]:
    """A row for each baseline; where those of several models are not equal, one for each model."""
    values: dict[str, dict[str, dict[Column, SavedMetric]]] = defaultdict(lambda: defaultdict(dict))
    for (name, group), record in latest.items():
        for score in record.baselines:
            values[score.name][name] |= {Column(group, metric.name): metric for metric in score.metrics}
    rows = []
    for baseline, by_model in values.items():
        merged: dict[Column, SavedMetric] = {}
        for own in by_model.values():
            merged |= own
        if all(merged[column] == cell for own in by_model.values() for column, cell in own.items()):
            rows.append(Row(baseline, merged, baseline=True))
        else:
            rows += [Row(f"{baseline} of {name}", own, baseline=True) for name, own in by_model.items()]
    return rows


def _pairs(latest: Latest) -> tuple[list[Paired], list[str]]:
    """Every model against the first one of its group, by top-1; and where that is not possible."""
    groups: dict[Group, list[tuple[str, SavedResult]]] = defaultdict(list)
    for (name, group), record in latest.items():
        groups[group].append((name, record))
    found: list[tuple[Column, str, str, Difference]] = []
    notes: list[str] = []
    for group, ((first, base), *others) in groups.items():
        for metric in base.score.metrics:
            if metric.name.partition(",")[0] != "top-1" or not others:
                continue
            if reason := _unpaired(metric, [base, *(record for _, record in others)]):
                notes.append(f"{group}: {reason}")
                continue
            for name, record in others:
                result = _difference(base, record, metric.name.removeprefix("top-1"))
                if isinstance(result, Difference):
                    found.append((Column(group, metric.name), name, first, result))
                else:
                    notes.append(f"{name} and {first} are not compared in pairs for {group}: {result}")
    corrected = holm([result.p for *_, result in found])
    return [Paired(*parts, p) for parts, p in zip(found, corrected, strict=True)], list(dict.fromkeys(notes))


def _unpaired(metric: SavedMetric, records: Sequence[SavedResult]) -> str | None:
    """Why a metric is of no use for paired tests, whatever was answered."""
    if metric.over_subsets:
        return "paired tests are not made of means over subsets"
    if any(record.chosen_on_test(metric.name) for record in records):
        return f"no paired test of {metric.name}, which was chosen by the test images"
    return None


def _roundings(latest: Latest) -> list[str]:
    """Where the models of one group computed in numbers of different precision."""
    groups: dict[Group, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (name, group), record in latest.items():
        if record.environment.forward is not None:
            groups[group][record.environment.forward].append(name)
    texts = {
        group: " and ".join(f"{kind} ({_listed(names)})" for kind, names in kinds.items())
        for group, kinds in groups.items()
        if len(kinds) > 1
    }
    return [
        f"{group}: the models computed in {text}; rounding is part of their difference" for group, text in texts.items()
    ]


def _warnings(latest: Latest) -> list[str]:
    """What the records warn of, each once, with the models."""
    found: dict[tuple[Group, str], list[str]] = defaultdict(list)
    for (name, group), record in latest.items():
        for text in dict.fromkeys(record.warnings):
            found[group, text].append(name)
    return [f"warning, {group}, {_listed(names)}: {text}" for (group, text), names in found.items()]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _difference(first: SavedResult, second: SavedResult, suffix: str) -> Difference | str:
    """How the second differs from the first on the images that both answered; or why that cannot be said."""
    answers = []
    for record in (first, second):
        given = read_answers(record, suffix)
        if given is None:
            return f"{record.path} lacks its answers ({record.answers or 'an npz beside it'})"
        answers.append(given)
    one, other = answers
    _, mine, its = np.intersect1d(one.place.numpy(), other.place.numpy(), return_indices=True)
    if not len(mine):
        return "they answered no image in common"
    rows, its_rows = torch.from_numpy(mine), torch.from_numpy(its)
    return difference(one.rank[rows] == 0, other.rank[its_rows] == 0)
