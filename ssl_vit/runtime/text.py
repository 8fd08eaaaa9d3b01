"""Text of messages and summaries: counts, lists, and tables in plain text, Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

TableStyle = Literal["text", "markdown", "latex"]
Row = Sequence[str]

RULE: Row = ()  # a row that separates: a blank line, or a rule in LaTeX
_MARKDOWN = re.compile(r"([\\`*_|<>\[\]])")
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "→": r"$\rightarrow$",
        "±": r"$\pm$",
        "†": r"\textdagger{}",
        "–": "--",
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    }
)


class Bold(str):
    """A cell in bold, where the style has it."""

    __slots__ = ()


def format_table(
    rows: Sequence[Row], headers: Row = (), *, style: TableStyle = "text", groups: Row = (), align: str = ""
) -> str:
    r"""Lay out cells in aligned columns, without a newline at the end.

    Args:
        rows: Cells; `Bold` ones stand out, `RULE` separates (not in Markdown), short rows are filled up, and in text
            a row of one cell is a heading over all columns. White space within a cell becomes one space, leading spaces
            indent it (text only), and characters with a meaning in the style are escaped.
        headers: Titles of the columns.
        style: Plain text, a Markdown pipe table, or a LaTeX tabular of the booktabs package.
        groups: A title above each header; equal neighbors are shown as one in LaTeX.
        align: A letter per column, l or r; by default the first is left-aligned and the others are right-aligned.

    Example:
        >>> print(format_table([["dino", "50.0 ± 9.6"], ["raw pixels", "25.0"]], ["in %", "top-1"]))
        in %             top-1
        dino        50.0 ± 9.6
        raw pixels        25.0
        >>> print(format_table([["a_b", Bold("1")]], ["", "n"], style="markdown"))
        |      |     n |
        |:-----|------:|
        | a\_b | **1** |
    """
    columns = max(map(len, [headers, *rows]))
    align = align or "l" + "r" * (columns - 1)
    titles = [escape(title, style) for title in headers]
    if groups and style != "latex":
        newline = "<br>" if style == "markdown" else "\n"
        stacked = zip((escape(group, style) for group in groups), titles, strict=True)
        titles = [f"{group}{newline}{title}" if group else title for group, title in stacked]
    if style == "markdown":
        rows = [row for row in rows if row]
    cells = [[_cell(cell, style) for cell in row] if row else SEPARATING_LINE for row in rows]
    headings = {}
    if style == "text":
        headings = {n - len(rows): row[0] for n, row in enumerate(rows) if len(row) == 1 and columns > 1}
        cells = [[""] if n - len(rows) in headings else row for n, row in enumerate(cells)]
        # Headers as a row: tabulate makes columns wider than their headers.
        cells, titles = [titles, *cells] if titles else cells, []
    table = tabulate(
        cells,
        titles,
        tablefmt={"text": "plain", "markdown": "pipe", "latex": _booktabs(groups, align)}[style],
        colalign=["left" if letter == "l" else "right" for letter in align],
        disable_numparse=True,
        preserve_whitespace=True,
    )
    lines = table.splitlines()
    for number, heading in headings.items():
        lines[number] = heading
    return "\n".join(line.rstrip() for line in lines)


def escape(text: str, style: TableStyle) -> str:
    """Return a text on one printable line, with the characters escaped that have a meaning in Markdown or LaTeX."""
    line = printable(" ".join(text.split()))
    if style == "markdown":
        return _MARKDOWN.sub(r"\\\1", line)
    return line.translate(_LATEX) if style == "latex" else " " * (len(text) - len(text.lstrip(" "))) + line


def printable(text: str) -> str:
    """Return a text with escapes for control characters, such as those that color or move text of a terminal."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _cell(cell: str, style: TableStyle) -> str:
    text = escape(cell, style)
    bold = {"text": text, "markdown": f"**{text}**", "latex": rf"\textbf{{{text}}}"}
    return bold[style] if isinstance(cell, Bold) else text


def _booktabs(groups: Row, align: str) -> TableFormat:
    """Return tabulate's format of a tabular whose cells are escaped, with groups of columns above the headers."""
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    spans = [(title, len(list(columns))) for title, columns in groupby(groups)]
    if spans:
        cells, rules, start = [], [], 1
        for title, width in spans:
            cells.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(title, 'latex')}}}" if title else " & " * (width - 1))
            rules += [rf"\cmidrule(lr){{{start}-{start + width - 1}}}"] if title else []
            start += width
        lines += [rf"{' & '.join(cells)} \\", "".join(rules)]
    return TableFormat(
        lineabove=Line("\n".join(lines), "", "", ""),
        linebelowheader=Line(r"\midrule", "", "", ""),
        linebetweenrows=None,
        linebelow=Line("\\bottomrule\n\\end{tabular}", "", "", ""),
        headerrow=DataRow("", " & ", r" \\"),
        datarow=DataRow("", " & ", r" \\"),
        padding=0,
        with_header_hide=None,
    )


def csv_text(text: str) -> str:
    """Return a name as a cell of a CSV file that no spreadsheet computes: an apostrophe before `=`, `+`, `-` or `@`."""
    line = printable(text)
    return f"'{line}" if line.lstrip()[:1] in ("=", "+", "-", "@") else line


def pluralize(count: int, noun: str, plural: str | None = None) -> str:
    """Return the count with its noun in singular or plural: `1 image`, `2,000 images`, `3 classes` (with `plural`)."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def truncate_list(lines: list[str], limit: int, hint: str = "") -> list[str]:
    """Return the first `limit` lines and, if there are more, their number with a hint: `... and 3 more`."""
    more = [f"... and {len(lines) - limit:,} more{hint}"] if len(lines) > limit else []
    return [*lines[:limit], *more]
