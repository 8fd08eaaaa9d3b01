"""Charts as SVG that stands in a page: its texts are texts, and it takes its colours from the page's style."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ssl_vit.report.content import Curve, Headline

MOST_POINTS = 300  # of a line
LINES = 6  # colours of lines in the style
DASHES = ("-", "--", ":", "-.")
VALUE = "value, 95 % interval"
MARKS = ("o", "|", "^", "s", "x", "D")  # of the baselines

# Colours that stand for variables of the style; matplotlib knows only real ones.
INK, MUTED, RULE, ACCENT = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", ACCENT: "var(--accent)"}
_VARIABLES |= {f"#0102{place:02x}": f"var(--line-{place})" for place in range(LINES)}

Points = list[tuple[float, float]]


def line_chart(curve: Curve) -> Markup:
    """Lines over the steps, with the level to compare with.

    Args:
        curve: Lines of more than 300 points are drawn with the extremes of every stretch; points that are not finite
            are left out.

    Returns:
        An `<svg>` element that says in words where each line starts and ends. The same curve gives the same text.
    """
    lines = {name: thinned([p for p in points if all(map(math.isfinite, p))]) for name, points in curve.lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    with _style():
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for place, (name, points) in enumerate(lines.items()):
            steps, values = zip(*points, strict=True)
            dash, marker = DASHES[place // LINES % len(DASHES)], "o" if len(points) == 1 else ""
            axes.plot(steps, values, dash, marker=marker, color=f"#0102{place % LINES:02x}", label=_literal(name))
        if curve.baseline is not None:
            axes.axhline(
                curve.baseline,
                color=MUTED,
                linestyle=(0, (4, 3)),
                linewidth=1,
                label=f"to compare with: {curve.baseline:.3g}",
            )
        axes.set_xlabel("step")
        axes.set_ylabel(_literal(curve.unit))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if len(lines) + (curve.baseline is not None) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
        return _svg(figure, _in_words(curve, lines))


def interval_chart(headlines: list[Headline]) -> Markup:
    """Each value with its interval on one axis from 0 to 100 %, and its baselines as marks.

    Returns:
        An `<svg>` element; what it shows has to stand beside it as a table.
    """
    names = list(dict.fromkeys(name for headline in headlines for name in headline.baselines))
    with _style():
        figure = Figure(figsize=(5.6, 0.8 + 0.48 * len(headlines)), layout="constrained")
        axes = figure.add_subplot()
        for row, headline in enumerate(headlines):
            axes.axhline(row, color=RULE, linewidth=1, zorder=0)
            for name, value in headline.baselines.items():
                mark = MARKS[names.index(name) % len(MARKS)]
                axes.plot(100 * value, row, mark, color=MUTED, markersize=6, label=_literal(name), mfc="none")
            axes.plot([100 * headline.low, 100 * headline.high], [row, row], color=ACCENT, linewidth=5, alpha=0.4)
            axes.plot(100 * headline.value, row, "o", color=ACCENT, markersize=6, label=VALUE)
            label = f"{headline.task}: {headline.metric}, {headline.data}"
            axes.annotate(_literal(label), (0, row), xytext=(0, 7), textcoords="offset points")
        axes.set(xlabel="%", xlim=(0, 100), ylim=(len(headlines) - 0.6, -0.8), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        handles, labels = axes.get_legend_handles_labels()
        marks = dict(zip(labels, handles, strict=True))
        marks = {VALUE: marks.pop(VALUE), **marks}
        axes.legend(marks.values(), marks.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
        words = "; ".join(f"{h.task}, {h.metric}: {h.value:.1%}, {h.low:.1%} to {h.high:.1%}" for h in headlines)
        return _svg(figure, f"The headline numbers with their intervals and baselines. {words}")


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
    told = [
        f"{name} goes from {points[0][1]:.4g} at step {points[0][0]:,.0f} to {points[-1][1]:.4g}"
        f" at step {points[-1][0]:,.0f}"
        for name, points in lines.items()
    ]
    if curve.baseline is not None:
        told.append(f"to compare with: {curve.baseline:.4g}")
    return f"{curve.title} ({curve.unit}): {'; '.join(told) or 'no points'}"


@contextmanager
def _style() -> Iterator[None]:
    """Charts look alike whatever style the user has set for matplotlib."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "ssl-vit",
                "font.size": 10,
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
                "grid.linewidth": 0.8,
                "xtick.color": RULE,
                "ytick.color": RULE,
                "xtick.labelcolor": MUTED,
                "ytick.labelcolor": MUTED,
                "lines.linewidth": 1.6,
                "legend.frameon": False,
                "legend.handlelength": 1.6,
                "legend.columnspacing": 1.2,
                "path.simplify": False,
            }
        )
        yield


def _literal(text: str) -> str:
    """A text as matplotlib draws it letter by letter: no lines, nothing it would leave out of a legend."""
    printable = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return f"\N{ZERO WIDTH SPACE}{printable}" if printable.startswith("_") else printable


def _svg(figure: Figure, words: str) -> Markup:
    """The figure as an element of a page: colours from its style, names that no other chart has, no declarations."""
    file = io.StringIO()
    figure.savefig(
        file,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
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
    short = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path)
    return f" {' '.join(short.split())}"
