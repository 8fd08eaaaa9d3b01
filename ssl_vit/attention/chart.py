"""IoU over the share of the attention that a mask holds, as a small chart."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ssl_vit.attention.summary import NETWORK, Result

RULES = {"oracle head": "#8a5a00", "fixed head": "#0057a8", "mean": "#b3003c"}


def write_curves(path: Path, results: list[Result], mass: float) -> None:
    """Each head rule of the network (solid) and of its random twin (dashed), beside the centre prior.

    Args:
        path: A PNG.
        results: Of which some may have no attention; then there is nothing to draw.
        mass: That the masks were made with.
    """
    curves = {result.name: result.details["IoU by mass"] for result in results if "IoU by mass" in result.details}
    if not curves:
        return
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for network, curve in curves.items():
        for rule, colour in RULES.items():
            if rule in curve:
                style = "-" if network == NETWORK else "--"
                axes.plot(curve["mass"], curve[rule], style, color=colour, label=f"{rule}, {network}", linewidth=1.6)
    for result in results:
        if result.name == "centre prior":
            level = result.ious["IoU"].mean().item()
            axes.axhline(level, color="#555555", linestyle=":")
            axes.annotate(
                "centre prior", (0.01, level), (0, 3), textcoords="offset points", fontsize=8, color="#555555"
            )
    axes.axvline(mass, color="#cccccc", linewidth=1, zorder=0)
    axes.set(xlabel="share of the attention that the mask holds", ylabel="mean IoU", xlim=(0, 1), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(path, dpi=130)
