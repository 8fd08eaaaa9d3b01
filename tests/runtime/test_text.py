"""Counts in messages, and tables in plain text, Markdown and LaTeX."""

import re

import pytest

from ssl_vit.runtime.text import RULE, Bold, csv_text, format_table, pluralize

ROWS = [["dino_x", Bold("50.0 ± 9.6"), "3"], RULE, ["  raw pixels", "–"]]
HEADERS = ["in %", "top-1", "top-5"]
GROUPS = ["", "knn on a_b", "knn on a_b"]


def test_format_table_aligns_columns():
    assert format_table(ROWS, HEADERS).splitlines() == [
        "in %               top-1  top-5",
        "dino_x        50.0 ± 9.6      3",
        "",
        "  raw pixels           –",
    ]
    assert format_table([["1.50", "a"], ["x", "bc"]], align="rl") == "1.50  a\n   x  bc"
    assert format_table([]) == ""


def test_format_table_headings_do_not_widen_columns():
    rows = [["first section of the table"], ["  a", "1"], ["second"], ["  b", "2"]]
    assert format_table(rows, ["", "n"]).splitlines() == [
        "     n",
        "first section of the table",
        "  a  1",
        "second",
        "  b  2",
    ]


def test_format_table_puts_groups_above_headers():
    head, _, *rows = format_table(ROWS, HEADERS, style="markdown", groups=GROUPS).splitlines()
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    assert cells == ["in %", r"knn on a\_b<br>top-1", r"knn on a\_b<br>top-5"]
    assert [row.split()[1] for row in rows] == [r"dino\_x", "raw"]
    latex = format_table(ROWS, HEADERS, style="latex", groups=GROUPS)
    assert latex.splitlines()[:4] == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r" & \multicolumn{2}{c}{knn on a\_b} \\",
        r"\cmidrule(lr){2-3}",
    ]
    assert latex.count(r"\midrule") == 2
    assert r"\textbf{50.0 $\pm$ 9.6}" in latex


@pytest.mark.parametrize("style", ["text", "markdown", "latex"])
def test_format_table_keeps_odd_cells_in_their_column(style):
    odd = "a|b*c_d & 50% $x$ {y} #1 ~ ^ \\ <td>\n\n% end"
    table = format_table([[odd, "1"], ["x", "2"]], [odd, odd], style=style)
    lines = [line for line in table.splitlines() if not line.startswith(("\\", "|:"))]
    assert len(lines) == 3
    if style != "text":
        separator = {"markdown": r"(?<!\\)\|", "latex": r"(?<!\\)&"}[style]
        assert len({len(re.findall(separator, line)) for line in lines}) == 1


def test_pluralize_uses_the_singular_for_one_only():
    assert [pluralize(count, "image") for count in (0, 1, 2, 2000)] == [
        "0 images",
        "1 image",
        "2 images",
        "2,000 images",
    ]
    assert pluralize(3, "class", "classes") == "3 classes"


@pytest.mark.parametrize("style", ["text", "markdown", "latex"])
def test_format_table_has_no_control_characters(style):
    table = format_table([["a\x1b[31m\nb\x9b", "1"]], ["run\r\x07", "n"], style=style)
    assert all(line.isprintable() for line in table.split("\n"))


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+a", "'+a"),
        ("-a", "'-a"),
        (" @a", "' @a"),
        ("\t=1", "\\t=1"),
        ("a=b", "a=b"),
        ("bear", "bear"),
    ],
)
def test_csv_text_is_no_formula(name, cell):
    assert csv_text(name) == cell
