"""The content of a report, and its JSON export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor

from ssl_vit.evaluation.results.eval_result import json_safe
from ssl_vit.visualization.image_grid import TitledFigure

SCHEMA = 2  # of the JSON; grows when a key changes its meaning


class MetricRow(NamedTuple):
    """One metric of an evaluation with its baselines."""

    task: str  # knn, linear, attention, ...
    task_title: str  # the task in words
    metric: str  # top-1, k=20
    title: str  # the metric in words
    data: str  # name of the images
    value: float  # in [0, 1]
    low: float  # of the 95 % interval
    high: float
    interval: str  # how low and high were computed
    n: int  # images
    baselines: dict[str, float]  # random init, raw pixels, center prior, ...
    remark: str  # what a reader must know, or nothing
    result: str  # the result's file, relative to the run
    level: Literal["main", "further", "ground truth"]  # shown first, folded, or folded: made with the ground truth

    @property
    def margin(self) -> float | None:
        """Distance to the highest baseline."""
        return self.value - max(self.baselines.values()) if self.baselines else None


class Curve(NamedTuple):
    """Lines over the optimizer steps that share an axis."""

    title: str
    unit: str  # of the vertical axis
    lines: dict[str, list[tuple[float, float]]]  # (step, value) by name
    baseline: float | None  # a level to compare with: random weights, ln K, ...


class HealthRow(NamedTuple):
    """A health warning of the run."""

    name: str
    step: int | None
    text: str
    remedy: str


class GalleryImage(NamedTuple):
    """One image with the attention maps of all heads."""

    name: str
    image: Image.Image  # RGB, as large as the page shows it
    maps: Tensor  # (heads, rows, columns) float32; each sums to 1
    ground_truth: Tensor | None  # (H, W) bool, at the image's own size
    valid: Tensor | None  # (H, W) bool: all pixels but the void ones
    ious: list[float] | None  # of the masks of the heads, then of their mean


class MaskImage(NamedTuple):
    """One image with its ground truth mask and the masks of different methods."""

    name: str
    image: Image.Image  # RGB, as large as the page shows it
    ground_truth: Tensor  # (H, W) bool, at the image's own size
    masks: Tensor  # (methods, rows, columns) bool, in the order of `ious`
    ious: dict[str, float]  # by method


class NeighborImage(NamedTuple):
    """One image of a row of neighbors."""

    image: Image.Image  # RGB
    name: str
    label: str | None  # its class, where that is known
    similarity: float | None  # cosine to the query; None for the query itself
    same_class: bool | None  # as the query; None for the query itself, and where a class is not known


class EmbeddingMap(NamedTuple):
    """Features projected to a plane."""

    points: Tensor  # (N, 2) float32
    labels: Tensor  # (N,) int64; -1 where it is not known
    classes: list[str]
    names: list[str]  # of the images
    images: list[Image.Image]  # RGB, small
    text: str  # how the plane was computed


@dataclass
class ReportData:
    """All content of a report. What a run lacks stays empty, and `missing` says how to get it."""

    title: str
    caption: dict[str, str] = field(default_factory=dict)  # a few words: method, model, training, images, date
    metadata: dict[str, str] = field(default_factory=dict)  # checkpoint, its hash, data, versions, seed, command, ...
    metrics: list[MetricRow] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    health_warnings: list[HealthRow] = field(default_factory=list)
    attention_mass: float = 0.6  # share of the attention that the masks hold at first
    gallery: list[GalleryImage] = field(default_factory=list)
    masks: list[MaskImage] = field(default_factory=list)
    neighbors: list[list[NeighborImage]] = field(default_factory=list)  # rows: the query, then the nearest first
    neighbors_text: str = ""  # which rows of neighbors these are
    embedding_map: EmbeddingMap | None = None
    figures: list[TitledFigure] = field(default_factory=list)  # of `ssl-vit inspect`, and those drawn in training
    config: dict[str, Any] = field(default_factory=dict)  # of the run
    protocol: dict[str, str] = field(default_factory=dict)  # by section: how its content was computed
    missing: dict[str, str] = field(default_factory=dict)  # by section: why it is empty, and the command that fills it


def to_json(report: ReportData) -> dict[str, Any]:
    """Return a report without images and tensors as plain containers for strict JSON: NaN is null."""
    content: dict[str, Any] = json_safe({"schema": SCHEMA, **_plain(vars(report))})
    return content


def downscale_images(report: ReportData) -> ReportData:
    """Return the report with images of half their size."""
    return ReportData(**{name: _halved(value) for name, value in vars(report).items()})


def _plain(value: Any) -> Any:  # noqa: ANN401 - any part of a report
    if isinstance(value, EmbeddingMap):
        rows = zip(value.names, value.labels.tolist(), value.points.tolist(), strict=True)
        points = [{"name": name, "label": label, "x": x, "y": y} for name, label, (x, y) in rows]
        return {"text": value.text, "classes": value.classes, "points": points}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if not isinstance(part, Image.Image | Tensor)}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _halved(value: Any) -> Any:  # noqa: ANN401 - any part of a report
    if isinstance(value, Image.Image):
        return value.resize((max(8, value.width // 2), max(8, value.height // 2)), Image.Resampling.LANCZOS)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return type(value)._make(map(_halved, value))
    return [_halved(part) for part in value] if isinstance(value, list) else value
