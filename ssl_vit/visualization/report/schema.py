"""The content of a report as plain values, and its JSON export."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ssl_vit.evaluation.results.eval_result import json_safe
from ssl_vit.visualization.image_grid import TitledFigure


class Rank(Enum):
    """How much a number is in sight: first, folded, or folded with those that no method could reach by itself."""

    MAIN = "main"
    FURTHER = "further"
    GIVEN = "given mask"  # it is made with the mask that it is compared with


class MetricRow(NamedTuple):
    """One number of an evaluation, with what it has to be seen beside."""

    task: str  # knn, linear, attention, ...
    metric: str  # top-1, k=20
    data: str  # name of the images
    value: float  # in [0, 1]
    low: float  # of the 95 % interval
    high: float
    interval: str  # how low and high came about
    n: int  # images
    baselines: dict[str, float]  # random init, raw pixels, center prior, ...
    remark: str  # what a reader must know, or nothing
    record: str  # the file that it stands in, relative to the run
    title: str  # the metric in words
    rank: Rank


class Curve(NamedTuple):
    """Lines over the optimizer steps that share an axis."""

    title: str
    unit: str  # of the vertical axis
    lines: dict[str, list[tuple[float, float]]]  # (step, value) by name
    baseline: float | None  # a level to compare with: random weights, ln K, ...


class HealthRow(NamedTuple):
    """Something that the run said was wrong with itself."""

    name: str
    step: int | None
    text: str
    remedy: str


class GalleryImage(NamedTuple):
    """One image with all its attention maps."""

    name: str
    image: Image.Image  # RGB, as large as the page shows it
    maps: Tensor  # (heads, rows, columns) float32; each sums to 1
    truth: Tensor | None  # (H, W) bool: the given mask, at the image's own size
    ious: list[float] | None  # of the masks of the heads, then of their mean


class Segmented(NamedTuple):
    """One image with its masks by different methods beside the given one."""

    name: str
    image: Image.Image  # RGB, as large as the page shows it
    truth: Tensor  # (H, W) bool, at the image's own size
    masks: dict[str, Tensor]  # (rows, columns) bool, by method
    ious: dict[str, float]


class Near(NamedTuple):
    """One image of a row of neighbors."""

    image: Image.Image  # RGB
    name: str
    label: str | None  # its class, where that is known
    similarity: float | None  # cosine to the query; None for the query itself


class FeatureMap(NamedTuple):
    """Features as points of a plane."""

    points: Tensor  # (N, 2) float32
    labels: Tensor  # (N,) int64; -1 where it is not known
    classes: list[str]
    names: list[str]  # of the images
    images: list[Image.Image]  # RGB, small
    text: str  # how the plane came about


class ReportData(NamedTuple):
    """All of a report. What a run has nothing of stays empty, and `missing` says how to get it."""

    title: str
    essentials: dict[str, str]  # the facts in a few words: method, model, training, images, date
    facts: dict[str, str]  # checkpoint, its hash, data, date, versions, seed, command, ...
    headlines: list[MetricRow]
    curves: list[Curve]
    verdicts: list[HealthRow]
    mass: float  # share of the attention that the masks hold at first
    attended: list[GalleryImage]
    segmented: list[Segmented]
    neighbors: list[list[Near]]  # per row the query, then its neighbors, the nearest first
    feature_map: FeatureMap | None
    panels: list[TitledFigure]  # of `ssl-vit inspect`
    reconstructions: list[TitledFigure]
    config: dict[str, Any]  # of the run
    how: dict[str, str]  # how what is shown was computed
    missing: dict[str, str]  # by section: why it is not there, and the command that makes it
    neighbors_text: str = ""  # which rows of neighbors these are


SCHEMA = 1  # grows when a key changes its meaning


def to_json(content: ReportData) -> dict[str, Any]:
    """Return a report as plain containers for strict JSON: what is not a finite number is null."""
    plain = {
        "schema": SCHEMA,
        **content._asdict(),
        "headlines": [{**headline._asdict(), "rank": headline.rank.value} for headline in content.headlines],
        "curves": [curve._asdict() for curve in content.curves],
        "verdicts": [verdict._asdict() for verdict in content.verdicts],
        "attended": [{"name": seen.name, "heads": len(seen.maps), "ious": seen.ious} for seen in content.attended],
        "segmented": [{"name": entry.name, "ious": entry.ious} for entry in content.segmented],
        "neighbors": [
            [{"name": near.name, "label": near.label, "similarity": near.similarity} for near in row]
            for row in content.neighbors
        ],
        "feature_map": None if content.feature_map is None else _plane(content.feature_map),
        "panels": [{"title": panel.title, "text": panel.text} for panel in content.panels],
        "reconstructions": [{"title": panel.title, "text": panel.text} for panel in content.reconstructions],
    }
    strict: dict[str, Any] = json_safe(plain)
    return strict


def _plane(features: FeatureMap) -> dict[str, Any]:
    return {
        "text": features.text,
        "classes": features.classes,
        "points": [
            {"name": name, "label": label, "x": x, "y": y}
            for name, label, (x, y) in zip(
                features.names, features.labels.tolist(), features.points.tolist(), strict=True
            )
        ],
    }
