"""SVG charts of the page: real text, colors of the page's style."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ssl_vit.visualization.report.schema import Curve, MetricRow

MOST_POINTS = 300  # of a line
LINES = 6  # colors of lines in the style
DASHES = ("-", "--", ":", "-.")  # `dash-0` to `dash-3` in the style
MARKS = {"o": "○", "|": "|", "^": "△", "s": "□", "x": "×", "D": "◇"}  # of baselines, and how a text shows them
LONGEST_LABEL = 64  # letters that fit across a chart

# Colors that stand for variables of the style; matplotlib knows only real ones.
INK, MUTED, RULE, ACCENT = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", ACCENT: "var(--accent)"}
_VARIABLES |= {f"#0102{place:02x}": f"var(--line-{place})" for place in range(LINES)}

_STROKE = Markup(
    '<li><svg width="24" height="8" aria-hidden="true"><path d="M0 4H24" class="dash-{}" style="stroke: {}"/></svg>'
    "<span>{}</span></li>"
)
_SIGN = Markup('<li><span class="{}" aria-hidden="true">{}</span><span>{}</span></li>')

Points = list[tuple[float, float]]


def line_chart(curve: Curve) -> Markup:
    """Lines over the steps, with the level to compare with.

    Args:
        curve: Lines of more than 300 points are drawn with the extremes of every stretch; points that are not finite
            are omitted.

    Returns:
        A legend, where there is more than one line, and an `<svg>` element that says in words where each line starts
        and ends. The same curve gives the same text.
    """
    lines = {name: thinned([p for p in points if all(map(math.isfinite, p))]) for name, points in curve.lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    keys = []
    with _style():
        figure = Figure(figsize=(5.0, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for place, (name, points) in enumerate(lines.items()):
            steps, values = zip(*points, strict=True)
            color, dash = f"#0102{place % LINES:02x}", place // LINES % len(DASHES)
            axes.plot(steps, values, DASHES[dash], marker="o" if len(points) == 1 else "", color=color)
            keys.append(_STROKE.format(dash, _VARIABLES[color], name))
        if curve.baseline is not None:
            axes.axhline(curve.baseline, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            keys.append(_STROKE.format(1, _VARIABLES[MUTED], f"to compare with: {curve.baseline:.3g}"))
        axes.set(xlabel="step", ylabel=_literal(curve.unit))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        chart = _svg(figure, _in_words(curve, lines))
    return _legend(keys) + chart if len(keys) > 1 else chart


def interval_chart(headlines: list[MetricRow]) -> Markup:
    """Each value with its interval on one axis from 0 to 100 %, and its baselines as marks.

    Returns:
        A legend and an `<svg>` element; what it shows has to stand beside it as a table.
    """
    alike = Counter((headline.task, headline.title) for headline in headlines)
    names = dict.fromkeys(name for headline in headlines for name in headline.baselines)
    marks = dict(zip(names, itertools.cycle(MARKS), strict=False))
    with _style():
        figure = Figure(figsize=(4.8, 0.55 + 0.46 * len(headlines)), layout="constrained")
        axes = figure.add_subplot()
        for row, headline in enumerate(headlines):
            axes.axhline(row, color=RULE, linewidth=1, zorder=0)
            for name, value in headline.baselines.items():
                axes.plot(100 * value, row, marks[name], color=MUTED, markersize=6, markerfacecolor="none")
            axes.plot([100 * headline.low, 100 * headline.high], [row, row], color=ACCENT, linewidth=5, alpha=0.4)
            axes.plot(100 * headline.value, row, "o", color=ACCENT, markersize=6)
            of = f", {headline.data}" if alike[headline.task, headline.title] > 1 else ""
            label = textwrap.shorten(f"{headline.task}: {headline.title}{of}", LONGEST_LABEL)
            text = axes.annotate(_literal(label), (0, row), xytext=(0, 7), textcoords="offset points")
            text.set_in_layout(False)
        axes.set(xlabel="%", xlim=(0, 100), ylim=(len(headlines) - 0.6, -0.8), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        words = "; ".join(f"{h.task}, {h.metric}: {h.value:.1%}, {h.low:.1%} to {h.high:.1%}" for h in headlines)
        chart = _svg(figure, f"The numbers of the table with their intervals and baselines. {words}")
    own = _SIGN.format("accent", "●", "value, 95 % interval")
    return _legend([own, *(_SIGN.format("", MARKS[mark], name) for name, mark in marks.items())]) + chart


def thinned(points: Points) -> Points:
    """At most 300 of many points: of every stretch the lowest and the highest, and the two ends of the line."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2 - 1
    kept = {0, len(points) - 1}
    for number in range(stretches):
        places = range(number * len(points) // stretches, (number + 1) * len(points) // stretches)
        kept |= {min(places, key=lambda place: points[place][1]), max(places, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept)]


def _in_words(curve: Curve, lines: dict[str, Points]) -> str:
    texts = [
        f"{name} goes from {points[0][1]:.4g} at step {points[0][0]:,.0f} to {points[-1][1]:.4g}"
        f" at step {points[-1][0]:,.0f}"
        for name, points in lines.items()
    ]
    if curve.baseline is not None:
        texts.append(f"to compare with: {curve.baseline:.4g}")
    return f"{curve.title} ({curve.unit}): {'; '.join(texts) or 'no points'}"


@contextmanager
def _style() -> Iterator[None]:
    """Charts look alike whatever style the user has set for matplotlib."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "ssl-vit",
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
                "axes.unicode_minus": True,
                "grid.color": RULE,
                "grid.linewidth": 0.8,
                "xtick.color": RULE,
                "ytick.color": RULE,
                "xtick.labelcolor": MUTED,
                "ytick.labelcolor": MUTED,
                "lines.linewidth": 1.4,
                "path.simplify": False,
            }
        )
        yield


def _literal(text: str) -> str:
    """Return a text that matplotlib can draw on one line: unprintable characters are escaped."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _legend(keys: list[Markup]) -> Markup:
    """Return a legend as a list beside its chart, which wraps on narrow pages."""
    return Markup('<ul class="keys">{}</ul>').format(Markup().join(keys))


def _svg(figure: Figure, words: str) -> Markup:
    """Return the figure as an SVG element: colors of the page's style, ids unique to this chart, no declarations."""
    file = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn = file.getvalue()
    body = drawn[drawn.index("</style>") :].partition("</defs>")[2]
    body = re.sub(r"(fill|stroke): (#\w{6})", lambda found: f"{found[1]}: {_VARIABLES.get(found[2], found[2])}", body)
    body = re.sub(r"font-family: [^;\"]*; ", "", body)
    body = re.sub(r' d="[^"]*"', lambda path: _rounded(path[0]), body)
    digest = hashlib.sha256(body.encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="c{digest}{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#(\w+)', rf"\1#c{digest}\2", body).replace("xlink:href", "href")
    box = re.findall(r'viewBox="[^"]+"', drawn)[0]
    return Markup(f'<svg role="img" aria-label="{escape(words)}" {box}>{body}')


def _rounded(path: str) -> str:
    """Return the attribute `d` of a path with one decimal, on one line."""
    short = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path)
    return f" {' '.join(short.split())}"
