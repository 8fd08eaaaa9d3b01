"""A comparison as text for a terminal, as Markdown, or as LaTeX (with the booktabs package)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal

from ssl_vit.evaluation.results.comparison import Column, Comparison, Paired
from ssl_vit.evaluation.results.result_reader import SavedMetric
from ssl_vit.evaluation.results.statistics import RESAMPLES

Format = Literal["text", "markdown", "latex"]

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$",
    "†": r"\textdagger{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}
_MARKDOWN = re.compile(r"([\\`*_|<>\[\]])")
_DEVIATION = "mean ± standard deviation"  # of few labels, in records of before there was an interval
_PAIRED = ("evaluation", "model", "difference in points", "gained", "lost", "p", "p by Holm")


def render(comparison: Comparison, form: Format) -> str:
    """The table, the paired differences and the notes, without a newline at the end."""
    return {"text": _text, "markdown": _markdown, "latex": _latex}[form](comparison)


def _text(comparison: Comparison) -> str:
    """A block per evaluation, models side by side: terminals are narrow."""
    rows, lines, first = _rows(comparison), [], 0
    for title, count in _groups(comparison):
        places = range(first, first + count)
        first += count
        measured = [
            (name, cells)
            for row, (name, cells) in zip(comparison.rows, rows, strict=True)
            if not row.baseline or any(cells[place] != "–" for place in places)
        ]
        block = [[f"{title}, in %", *(name for name, _ in measured)]]
        block += [
            [_metric(comparison, comparison.columns[place]), *(cells[place] for _, cells in measured)]
            for place in places
        ]
        lines += [*_aligned(block), ""]
    del lines[-1]
    if comparison.paired:
        lines += ["", _paired_title(comparison), "", *_aligned([list(_PAIRED), *map(_paired, comparison.paired)])]
    return "\n".join([*lines, *(f"\n{note}" for note in _notes(comparison))])


def _markdown(comparison: Comparison) -> str:
    head = ["in %", *(f"{_escaped(str(c.group))}<br>{_escaped(_metric(comparison, c))}" for c in comparison.columns)]
    rows = [[_escaped(name), *cells] for name, cells in _rows(comparison, bold="**{}**".format)]
    lines = _pipes([head, *rows])
    if comparison.paired:
        paired = [[_escaped(cell) for cell in _paired(one)] for one in comparison.paired]
        lines += ["", _escaped(_paired_title(comparison)), "", *_pipes([list(_PAIRED), *paired])]
    return "\n".join([*lines, *(f"\n{_escaped(note)}" for note in _notes(comparison))])


def _latex(comparison: Comparison) -> str:
    titles, rules, start = [""], [], 2
    for title, count in _groups(comparison):
        titles.append(rf"\multicolumn{{{count}}}{{c}}{{{_tex(title)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    head = [r"in \%", *(_tex(_metric(comparison, column)) for column in comparison.columns)]
    parts: dict[bool, list[str]] = {False: [], True: []}  # models, baselines
    texts = _rows(comparison, bold=r"\textbf{{{}}}".format)
    for row, (name, cells) in zip(comparison.rows, texts, strict=True):
        parts[row.baseline].append(
            _tex_row([_tex(name), *(cell.replace("±", r"$\pm$").replace("–", "--") for cell in cells)])
        )
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(comparison.columns)}}}",
        r"\toprule",
        _tex_row(titles),
        "".join(rules),
        _tex_row(head),
        r"\midrule",
        *parts[False],
        *([r"\midrule", *parts[True]] if parts[True] else []),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if comparison.paired:
        paired = [_tex_row(map(_tex, _paired(one))) for one in comparison.paired]
        lines += ["", f"% {_paired_title(comparison)}", r"\begin{tabular}{llrrrrr}", r"\toprule"]
        lines += [_tex_row(map(_tex, _PAIRED)), r"\midrule", *paired, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *(f"% {' '.join(note.split())}" for note in _notes(comparison))])


def _metric(comparison: Comparison, column: Column) -> str:
    """The head of a column."""
    return f"{column.metric} †" if column in comparison.optimistic else column.metric


def _groups(comparison: Comparison) -> list[tuple[str, int]]:
    """The titles above the columns, and over how many columns they stand."""
    groups = groupby(comparison.columns, key=lambda column: column.group)
    return [(str(group), len(list(columns))) for group, columns in groups]


def _rows(comparison: Comparison, *, bold: Callable[[str], str] = str) -> list[tuple[str, list[str]]]:
    """Names and cells; the best of several models in bold."""
    best = {column: comparison.best(column) for column in comparison.columns}
    rows = []
    for row in comparison.rows:
        cells = []
        for column in comparison.columns:
            cell = row.cells.get(column)
            text = "–" if cell is None or cell.value is None else _cell(cell)
            wins = cell is not None and not row.baseline and cell.value is not None and cell.value == best[column]
            cells.append(bold(text) if wins else text)
        rows.append((row.name, cells))
    return rows


def _cell(metric: SavedMetric) -> str:
    """In percent, with half of the interval's length."""
    if metric.value is None:
        return "–"
    half = "" if metric.low is None or metric.high is None else f" ± {50 * (metric.high - metric.low):.1f}"
    return f"{100 * metric.value:.1f}{half}"


def _paired(one: Paired) -> list[str]:
    found = one.found
    points = f"{100 * found.value:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
    name = f"{one.column.group}, {one.column.metric}"
    counts = [f"{found.gained:,}", f"{found.lost:,}"]
    return [name, f"{one.name} - {one.first}", points, *counts, _p(found.p), _p(one.corrected)]


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}" if value else "0"


def _paired_title(comparison: Comparison) -> str:
    return (
        "Paired on the same test images; gained and lost: those that only the one, only the other has right; "
        f"95 % percentile interval of {RESAMPLES:,} bootstrap resamples; "
        f"p of McNemar's exact test, by Holm's method corrected for {_counted(len(comparison.paired))}"
    )


def _counted(count: int) -> str:
    return "this 1 comparison" if count == 1 else f"these {count} comparisons"


def _notes(comparison: Comparison) -> list[str]:
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for row in comparison.rows:
        for column, cell in row.cells.items():
            kind = cell.interval if cell.interval.startswith(_DEVIATION) else f"95 %, {cell.interval}"
            groups[kind][str(column.group)] = None
    kinds = "; ".join(f"{kind} ({', '.join(groups[kind])})" for kind in sorted(groups))
    daggers = ["† chosen by the test images: too high by design"] if comparison.optimistic else []
    return [f"± is half of the interval: {kinds}", *daggers, *comparison.notes]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return lines


def _pipes(cells: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]]]


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _tex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _tex_row(cells: Sequence[str] | map[str]) -> str:
    return " & ".join(cells) + r" \\"
