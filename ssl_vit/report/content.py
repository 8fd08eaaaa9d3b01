"""What a report holds, as plain values: gathered by one half of this package, drawn as a page by the other."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ssl_vit.inspection.panel import Panel


class Rank(Enum):
    """How much a number is in sight: first, folded, or folded with those that no method could reach by itself."""

    MAIN = "main"
    FURTHER = "further"
    GIVEN = "given mask"  # it is made with the mask that it is compared with


class Headline(NamedTuple):
    """One number of an evaluation, with what it has to be seen beside."""

    task: str  # knn, linear, attention, ...
    metric: str  # top-1, k=20
    data: str  # name of the pictures
    value: float  # in [0, 1]
    low: float  # of the 95 % interval
    high: float
    interval: str  # how low and high came about
    n: int  # pictures
    baselines: dict[str, float]  # random init, raw pixels, centre prior, ...
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


class Verdict(NamedTuple):
    """Something that the run said was wrong with itself."""

    name: str
    step: int | None
    text: str
    remedy: str


class Attended(NamedTuple):
    """One picture with all its attention maps."""

    name: str
    image: Image.Image  # RGB, as large as the page shows it
    maps: Tensor  # (heads, rows, columns) float32; each sums to 1
    truth: Tensor | None  # (H, W) bool: the given mask, at the picture's own size
    ious: list[float] | None  # of the masks of the heads, then of their mean


class Segmented(NamedTuple):
    """One picture with its masks by different methods beside the given one."""

    name: str
    image: Image.Image  # RGB, as large as the page shows it
    truth: Tensor  # (H, W) bool, at the picture's own size
    masks: dict[str, Tensor]  # (rows, columns) bool, by method
    ious: dict[str, float]


class Near(NamedTuple):
    """One picture of a row of neighbours."""

    image: Image.Image  # RGB
    name: str
    label: str | None  # its class, where that is known
    similarity: float | None  # cosine to the query; None for the query itself


class FeatureMap(NamedTuple):
    """Features as points of a plane."""

    points: Tensor  # (N, 2) float32
    labels: Tensor  # (N,) int64; -1 where it is not known
    classes: list[str]
    names: list[str]  # of the pictures
    images: list[Image.Image]  # RGB, small
    text: str  # how the plane came about


class Content(NamedTuple):
    """All of a report. What a run has nothing of stays empty, and `missing` says how to get it."""

    title: str
    essentials: dict[str, str]  # the facts in a few words: method, network, training, pictures, date
    facts: dict[str, str]  # checkpoint, its hash, data, date, versions, seed, command, ...
    headlines: list[Headline]
    curves: list[Curve]
    verdicts: list[Verdict]
    mass: float  # share of the attention that the masks hold at first
    attended: list[Attended]
    segmented: list[Segmented]
    neighbours: list[list[Near]]  # per row the query, then its neighbours, the nearest first
    feature_map: FeatureMap | None
    panels: list[Panel]  # of `ssl-vit inspect`
    reconstructions: list[Panel]
    config: dict[str, Any]  # of the run
    how: dict[str, str]  # how what is shown was computed
    missing: dict[str, str]  # by section: why it is not there, and the command that makes it
    neighbours_text: str = ""  # which rows of neighbours these are
