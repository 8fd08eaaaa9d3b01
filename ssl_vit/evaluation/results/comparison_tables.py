"""A comparison as text for a terminal, as Markdown, or as LaTeX (with the booktabs package)."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby

from ssl_vit.evaluation.results.comparison import Column, Comparison, Paired, Row
from ssl_vit.evaluation.results.statistics import RESAMPLES
from ssl_vit.runtime.text import RULE, Bold, TableStyle, escape, format_table
from ssl_vit.runtime.text import Row as Cells

_PAIRED = ("evaluation", "model", "difference in points", "gained", "lost", "p", "p by Holm")
_MISSING = "–"


def render(comparison: Comparison, style: TableStyle) -> str:
    """Return the table, the paired differences and the notes, without a newline at the end."""
    lines = [_blocks(comparison) if style == "text" else _one_table(comparison, style)]
    if comparison.paired:
        title = _paired_title(len(comparison.paired))
        table = format_table([_paired(one) for one in comparison.paired], _PAIRED, style=style, align="llrrrrr")
        lines += ["", f"% {title}" if style == "latex" else f"{escape(title, style)}\n", table]
    for note in _notes(comparison):
        lines.append(f"% {' '.join(note.split())}" if style == "latex" else f"\n{escape(note, style)}")
    return "\n".join(lines)


def _blocks(comparison: Comparison) -> str:
    """Return one table per evaluation with the models as columns, because terminals are narrow."""
    blocks = []
    for group, group_columns in groupby(comparison.columns, key=lambda column: column.group):
        columns = list(group_columns)
        shown = [
            row for row in comparison.rows if not row.baseline or any(_text(row, one) != _MISSING for one in columns)
        ]
        rows = [[_metric(comparison, column), *(_text(row, column) for row in shown)] for column in columns]
        blocks.append(format_table(rows, [f"{group}, in %", *(row.name for row in shown)]))
    return "\n\n".join(blocks)


def _one_table(comparison: Comparison, style: TableStyle) -> str:
    """Return one table with models as rows, the best of several in bold, and baselines below."""
    best = {column: _best(comparison, column) for column in comparison.columns}
    models: list[Cells] = []
    baselines: list[Cells] = []
    for row in comparison.rows:
        cells = [row.name]
        for column in comparison.columns:
            cell, text = row.cells.get(column), _text(row, column)
            wins = cell is not None and not row.baseline and cell.value == best[column]
            cells.append(Bold(text) if wins else text)
        (baselines if row.baseline else models).append(cells)
    return format_table(
        [*models, RULE, *baselines] if baselines else models,
        ["in %", *(_metric(comparison, column) for column in comparison.columns)],
        style=style,
        groups=["", *(str(column.group) for column in comparison.columns)],
    )


def _best(comparison: Comparison, column: Column) -> float | None:
    """Return the highest value of a column, if it has several models."""
    cells = [row.cells[column] for row in comparison.rows if not row.baseline and column in row.cells]
    values = [cell.value for cell in cells if cell.is_number]
    return max(values) if len(values) > 1 else None


def _metric(comparison: Comparison, column: Column) -> str:
    return f"{column.metric} †" if column in comparison.optimistic else column.metric


def _text(row: Row, column: Column) -> str:
    cell = row.cells.get(column)
    return cell.percent if cell and cell.is_number else _MISSING


def _paired(one: Paired) -> list[str]:
    found = one.difference
    points = f"{100 * found.value:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
    name = f"{one.column.group}, {one.column.metric}"
    counts = [f"{found.gained:,}", f"{found.lost:,}"]
    return [name, f"{one.name} - {one.first}", points, *counts, _p(found.p), _p(one.adjusted)]


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}" if value else "0"


def _paired_title(count: int) -> str:
    return (
        "Paired on the same test images; gained and lost: correct by the first-named model only, by the other only; "
        f"95 % percentile interval of {RESAMPLES:,} bootstrap resamples; p of McNemar's exact test, "
        f"by Holm's method corrected for {'this 1 comparison' if count == 1 else f'these {count} comparisons'}"
    )


def _notes(comparison: Comparison) -> list[str]:
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for row in comparison.rows:
        for column, cell in row.cells.items():
            groups[cell.interval][str(column.group)] = None
    kinds = "; ".join(f"95 %, {kind} ({', '.join(groups[kind])})" for kind in sorted(groups))
    daggers = ["† selected on the test images: too high by design"] if comparison.optimistic else []
    return [f"± is half of the interval: {kinds}", *daggers, *comparison.notes]
