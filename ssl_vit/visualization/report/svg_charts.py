"""SVG charts of the page: real text, colors of the page's style."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import textwrap
from collections import Counter

import matplotlib
import matplotlib.style
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ssl_vit.visualization.report.report_data import Curve, MetricRow

LINES = 6  # colors of lines in the style
DASHES = ("-", "--", ":", "-.")  # `dash-0` to `dash-3` in the style
MARKERS = {"o": "○", "|": "|", "^": "△", "s": "□", "x": "×", "D": "◇"}  # of baselines, and their legend
MAX_LABEL = 64  # letters that fit across a chart

# Colors that stand for variables of the style; matplotlib knows only real ones.
INK, MUTED, RULE, ACCENT = "#010101", "#010102", "#010103", "#010104"
_LINE_COLORS = [f"#0102{number:02x}" for number in range(LINES)]
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", ACCENT: "var(--accent)"}
_VARIABLES |= {color: f"var(--line-{number})" for number, color in enumerate(_LINE_COLORS)}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ssl-vit",
    "font.sans-serif": ["DejaVu Sans"],  # to measure with; the page shows its own
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.4,
}
_LINE_KEY = Markup(
    '<li><svg width="24" height="8" aria-hidden="true"><path d="M0 4H24" class="dash-{}" style="stroke: {}"/></svg>'
    "<span>{}</span></li>"
)
_MARKER_KEY = Markup('<li><span class="{}" aria-hidden="true">{}</span><span>{}</span></li>')


def line_chart(curve: Curve) -> Markup:
    """Draw lines over the steps, with the level to compare with; points that are not finite are omitted.

    Returns:
        A legend, where there is more than one line, and an `<svg>` element that says in words where each line starts
        and ends. The same curve gives the same text.
    """
    finite = {name: [point for point in line if all(map(math.isfinite, point))] for name, line in curve.lines.items()}
    keys, words = [], []
    with matplotlib.style.context(_STYLE, after_reset=True):  # whatever style the user has set
        figure = Figure(figsize=(5.0, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, points) in enumerate((name, points) for name, points in finite.items() if points):
            steps, values = zip(*points, strict=True)
            color, dash = _LINE_COLORS[number % LINES], number // LINES % len(DASHES)
            axes.plot(steps, values, DASHES[dash], marker="o" if len(points) == 1 else "", color=color)
            keys.append(_LINE_KEY.format(dash, _VARIABLES[color], name))
            words.append(
                f"{name} goes from {values[0]:.4g} at step {steps[0]:,.0f} to {values[-1]:.4g} at step {steps[-1]:,.0f}"
            )
        if curve.baseline is not None:
            axes.axhline(curve.baseline, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            keys.append(_LINE_KEY.format(1, _VARIABLES[MUTED], f"to compare with: {curve.baseline:.3g}"))
            words.append(f"to compare with: {curve.baseline:.4g}")
        axes.set(xlabel="step", ylabel=_printable(curve.unit))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        chart = _svg(figure, f"{curve.title} ({curve.unit}): {'; '.join(words) or 'no points'}")
    return _legend(keys) + chart if len(keys) > 1 else chart


def interval_chart(rows: list[MetricRow]) -> Markup:
    """Draw each value with its interval on one axis from 0 to 100 %, and its baselines as markers.

    Returns:
        A legend and an `<svg>` element; what it shows has to stand beside it as a table.
    """
    count = Counter((row.task, row.title) for row in rows)
    names = dict.fromkeys(name for row in rows for name in row.baselines)
    markers = dict(zip(names, itertools.cycle(MARKERS), strict=False))
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(4.8, 0.55 + 0.46 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for height, row in enumerate(rows):
            axes.axhline(height, color=RULE, linewidth=1, zorder=0)
            for name, value in row.baselines.items():
                axes.plot(100 * value, height, markers[name], color=MUTED, markersize=6, markerfacecolor="none")
            axes.plot([100 * row.low, 100 * row.high], [height, height], color=ACCENT, linewidth=5, alpha=0.4)
            axes.plot(100 * row.value, height, "o", color=ACCENT, markersize=6)
            of = f", {row.data}" if count[row.task, row.title] > 1 else ""
            label = textwrap.shorten(f"{row.task}: {row.title}{of}", MAX_LABEL)
            text = axes.annotate(_printable(label), (0, height), xytext=(0, 7), textcoords="offset points")
            text.set_in_layout(False)
        axes.set(xlabel="%", xlim=(0, 100), ylim=(len(rows) - 0.6, -0.8), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        words = "; ".join(f"{r.task}, {r.metric}: {r.value:.1%}, {r.low:.1%} to {r.high:.1%}" for r in rows)
        chart = _svg(figure, f"The numbers of the table with their intervals and baselines. {words}")
    own = _MARKER_KEY.format("accent", "●", "value, 95 % interval")
    return _legend([own, *(_MARKER_KEY.format("", MARKERS[marker], name) for name, marker in markers.items())]) + chart


def _printable(text: str) -> str:
    """Return a text that matplotlib can draw on one line: unprintable characters are escaped."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _legend(keys: list[Markup]) -> Markup:
    """Return a legend as a list beside its chart, which wraps on narrow pages."""
    return Markup('<ul class="keys">{}</ul>').format(Markup().join(keys))


def _svg(figure: Figure, words: str) -> Markup:
    """Return the figure as an SVG element with the colors of the page's style and ids unique to this chart."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = " ".join(file.getvalue().split())
    prefix = f"c{hashlib.sha256(drawn.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}-"
    for before in (' id="', "url(#", 'href="#'):
        drawn = drawn.replace(before, before + prefix)
    for color, variable in _VARIABLES.items():
        drawn = drawn.replace(color, variable)
    return Markup(f'<svg role="img" aria-label="{escape(words)}" {drawn[drawn.index("<svg ") + 5 :]}')
