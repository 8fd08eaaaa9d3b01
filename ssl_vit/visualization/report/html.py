"""Render the report as one HTML file without external resources."""

from __future__ import annotations

from importlib.resources import files
from itertools import groupby
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup, escape

from ssl_vit.evaluation.segmentation.iou import pool_mask_to_patches
from ssl_vit.visualization.image_grid import COLOR_MAP, TitledFigure
from ssl_vit.visualization.overlays import MIN_SCALE_MAX
from ssl_vit.visualization.report.encode import (
    Embedded,
    as_bytes,
    as_json,
    count_bytes,
    drawing,
    map_bytes,
    outline,
    photograph,
    sprite,
    utf8_safe,
)
from ssl_vit.visualization.report.schema import FeatureMap, GalleryImage, MetricRow, Near, Rank, ReportData, Segmented
from ssl_vit.visualization.report.svg_charts import interval_chart, line_chart

PHOTO_SIDE = 360  # pixels of an image that maps or masks are drawn over
NEAR_SIDE = 96
PANEL_SIDE = 1300
WIDE = 2.6  # a panel of such an aspect takes the page's whole width
TASKS = {
    "knn": "Nearest neighbors (kNN)",
    "linear": "Linear classifier on frozen features",
    "finetune": "Fine-tuning",
    "fewshot": "Few labels",
    "transfer": "Transfer",
    "attention": "Object masks, IoU",
}
SCRIPTS = ("report.js", "attention.js", "masks.js", "scatter.js")


class Section(NamedTuple):
    """A part of the page that there is something to show in."""

    key: str
    title: str


def render(content: ReportData) -> str:
    """Draw a report as the text of one HTML file.

    The same content gives the same text. Empty parts are omitted, and `missing` is listed at the end.
    In facts, remarks, verdicts, texts of panels, `how` and `missing`, words between backticks are set as code. Values
    are finite.

    Returns:
        Text that can be written as UTF-8: bytes of file names that are no UTF-8 stand as JSON writes them.
    """
    content = content._replace(attended=_best_first(content.attended))
    methods = list(dict.fromkeys(name for entry in content.segmented for name in entry.masks))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssl_vit.visualization.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "signed": _signed, "code": _code}
    page = environment.get_template("template.html").render(
        content=content,
        sections=_sections(content),
        style=Markup(_beside("report.css")),
        script=Markup("\n".join(map(_beside, SCRIPTS))),
        data=as_json(_data(content)),
        interval_chart=_chart(content.headlines),
        numbers={rank.name.lower(): _groups(content.headlines, rank) for rank in Rank},
        curves=[(curve, line_chart(curve)) for curve in content.curves],
        attended=[photograph(seen.image, PHOTO_SIDE) for seen in content.attended],
        segmented=[_segmented(entry, methods) for entry in content.segmented],
        methods=methods,
        neighbors=[
            [(near, photograph(near.image, NEAR_SIDE), _verdict(row[0], near)) for near in row]
            for row in content.neighbors
        ],
        panels=[_panel(panel) for panel in content.panels],
        reconstructions=[_panel(panel) for panel in content.reconstructions],
        config=yaml.safe_dump(content.config, sort_keys=False, allow_unicode=True) if content.config else "",
    )
    return utf8_safe(page)


def _sections(content: ReportData) -> list[Section]:
    every = {
        Section("numbers", "Numbers"): content.headlines,
        Section("attention", "Attention"): content.attended,
        Section("masks", "Masks"): content.segmented,
        Section("neighbors", "Neighbors"): content.neighbors,
        Section("plane", "Feature map"): content.feature_map,
        Section("curves", "Training"): content.curves,
        Section("health", "Health"): True,  # that nothing was found is a finding
        Section("panels", "Inside"): content.panels,
        Section("reconstructions", "Reconstructions"): content.reconstructions,
        Section("how", "How"): content.how or content.config,
        Section("missing", "Missing"): content.missing,
    }
    return [section for section, held in every.items() if held]


def _data(content: ReportData) -> dict[str, Any]:
    """Return the data that the scripts read."""
    ramp = matplotlib.colormaps[COLOR_MAP](np.arange(256), bytes=True)[:, :3]
    return {
        "mass": content.mass,
        "leastTop": MIN_SCALE_MAX,
        "colors": as_bytes(np.ascontiguousarray(ramp)),
        "heads": _head_names(content.attended),
        "attended": [_attended(seen) for seen in content.attended],
        "plane": _plane(content.feature_map) if content.feature_map else None,
    }


def _attended(seen: GalleryImage) -> dict[str, Any]:
    maps, tops = map_bytes(seen.maps)
    entry = {
        "name": utf8_safe(seen.name),
        "rows": seen.maps.shape[1],
        "columns": seen.maps.shape[2],
        "maps": maps,
        "tops": tops,
    }
    if seen.truth is None:
        return entry | {"truth": None}
    counted = pool_mask_to_patches(seen.truth, (seen.maps.shape[1], seen.maps.shape[2]))
    return entry | {
        "truth": {
            "object": count_bytes(counted.foreground),
            "height": seen.truth.shape[0],
            "width": seen.truth.shape[1],
            "outline": outline(seen.truth),
        }
    }


def _plane(features: FeatureMap) -> dict[str, Any]:
    """Points in a square of side 1 with the aspect kept, and their thumbnails."""
    low, high = features.points.amin(dim=0), features.points.amax(dim=0)
    span = (high - low).max().clamp(min=1e-12)
    places = (features.points - (low + high) / 2) / span + 0.5  # (N, 2)
    thumbnails = sprite(features.images)
    return {
        "x": [round(x, 4) for x in places[:, 0].tolist()],
        "y": [round(1 - y, 4) for y in places[:, 1].tolist()],
        "labels": features.labels.tolist(),
        "classes": [utf8_safe(name) for name in features.classes],
        "names": [utf8_safe(name) for name in features.names],
        "sprite": thumbnails._asdict(),
    }


class _Masked(NamedTuple):
    """An image with the outlines of its masks."""

    name: str
    image: Embedded
    truth: str
    masks: list[str]  # by method; empty where there is none
    ious: list[float | None]


def _segmented(entry: Segmented, methods: list[str]) -> _Masked:
    masks = [outline(entry.masks[method]) if method in entry.masks else "" for method in methods]
    ious = [entry.ious.get(method) for method in methods]
    return _Masked(entry.name, photograph(entry.image, PHOTO_SIDE), outline(entry.truth), masks, ious)


def _panel(panel: TitledFigure) -> tuple[TitledFigure, Embedded, bool]:
    """Return a figure, its encoded image, and whether it is wide."""
    return panel, drawing(panel.image, PANEL_SIDE), panel.image.width >= WIDE * panel.image.height


def _verdict(query: Near, near: Near) -> str:
    """Whether a neighbor has the query's class: right, wrong, or nothing where that is not known."""
    if near is query or query.label is None or near.label is None:
        return ""
    return "right" if near.label == query.label else "wrong"


def _best_first(attended: list[GalleryImage]) -> list[GalleryImage]:
    """By the IoU of the heads' mean, those without a given mask last."""
    return sorted(attended, key=lambda seen: -1.0 if seen.ious is None else seen.ious[-1], reverse=True)


def _chart(headlines: list[MetricRow]) -> str:
    main = [headline for headline in headlines if headline.rank == Rank.MAIN]
    return interval_chart(main) if main else ""


class _Group(NamedTuple):
    """Numbers that were measured together."""

    title: str
    data: str
    interval: str
    n: int
    rows: list[tuple[MetricRow, float | None]]  # with how far they are above the highest baseline

    @property
    def size(self) -> int:
        """How many numbers these are."""
        return len(self.rows)


def _groups(headlines: list[MetricRow], rank: Rank) -> list[_Group]:
    of_rank = [headline for headline in headlines if headline.rank == rank]
    together = groupby(of_rank, lambda each: (each.task, each.data, each.interval, each.n))
    return [
        _Group(TASKS.get(task, task), data, interval, n, [(headline, _margin(headline)) for headline in rows])
        for (task, data, interval, n), rows in together
    ]


def _margin(headline: MetricRow) -> float | None:
    """How far the value is above the highest baseline."""
    return headline.value - max(headline.baselines.values()) if headline.baselines else None


def _head_names(attended: list[GalleryImage]) -> list[str]:
    heads = max((len(seen.maps) for seen in attended), default=0)
    return [f"head {head}" for head in range(heads)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


def _code(text: str) -> Markup:
    """Return a text with the parts between backticks set as code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 and place < len(parts) - 1 else escape(part)
        for place, part in enumerate(parts)
    )


def _beside(name: str) -> str:
    return files("ssl_vit.visualization.report").joinpath(name).read_text(encoding="utf-8")
