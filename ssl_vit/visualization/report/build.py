"""Collect the report from a run directory: each section separately, so that one that fails leaves the others whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ssl_vit.config.visualize import ReportConfig
from ssl_vit.data.dataset import escape_path
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.report.attention_gallery import Gallery, make_gallery
from ssl_vit.visualization.report.embedding_map import embedding_map
from ssl_vit.visualization.report.figures import Panels, along_the_run, read_inspection
from ssl_vit.visualization.report.headline_metrics import headlines_of
from ssl_vit.visualization.report.image_sources import FeatureImages, known_images
from ssl_vit.visualization.report.nearest_images import Rows, neighbor_rows
from ssl_vit.visualization.report.run_metadata import load_health_warnings, run_caption, run_metadata
from ssl_vit.visualization.report.run_results import RunFolder, open_run
from ssl_vit.visualization.report.schema import FeatureMap, ReportData
from ssl_vit.visualization.report.training_curves import Metrics, load_curves

NUMBERS, TRAINING, HEALTH, ATTENTION = "Numbers", "Training", "Health", "Attention"
MASKS, NEIGHBORS, PLANE = "Masks", "Neighbors", "Feature map"
INSIDE, RECONSTRUCTIONS, CONFIG = "Inside", "Reconstructions", "Configuration"

PartT = TypeVar("PartT")


class _Sections:
    """How the sections of a report were made, and what is missing of them."""

    def __init__(self) -> None:
        self.how: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    def tell(self, section: str, text: str) -> None:
        if text:
            self.how[section] = text

    def miss(self, section: str, text: str) -> None:
        if text:
            self.missing[section] = text

    def attempt(self, section: str, part: Callable[[], PartT], otherwise: PartT) -> PartT:
        """Return the part; if it is not available, note the reason and return `otherwise`."""
        try:
            return part()
        except UserError as error:
            self.miss(section, str(error))
            return otherwise


def collect_report(config: ReportConfig, command: str) -> ReportData:
    """Everything that a page shows of a run.

    Args:
        config: Of the command.
        command: As the user can repeat it.

    Raises:
        UserError: There is no run.
    """
    run = open_run(config.run, config.weights)
    sections = _Sections()
    headlines = headlines_of(run.records, run.loaded, run.path)
    _tell_numbers(run, sections, some=bool(headlines))
    sections.miss(CONFIG, run.problems.get("config", ""))
    metrics = _training(run, sections)
    gallery = sections.attempt(ATTENTION, lambda: make_gallery(run, config), Gallery([], [], "", "", ""))
    _tell_gallery(gallery, sections)
    rows, points = _features(run, config, sections)
    panels = _panels(run, sections)
    journals = load_health_warnings(run.path)
    sections.tell(HEALTH, _health(journals.damaged, {verdict.name for verdict in journals.verdicts}))
    return ReportData(
        title=escape_path(str(run.value("run.name") or run.path.resolve().name)),
        facts=run_metadata(run, command),
        essentials=run_caption(run),
        headlines=headlines,
        curves=metrics.curves,
        verdicts=journals.verdicts,
        mass=config.attention_mass,
        attended=gallery.attended,
        segmented=gallery.segmented,
        neighbors=rows.rows,
        neighbors_text=rows.text,
        feature_map=points,
        panels=panels.inside,
        reconstructions=panels.reconstructions,
        config=run.config,
        how=sections.how,
        missing=sections.missing,
    )


def _training(run: RunFolder, sections: _Sections) -> Metrics:
    prototypes = run.value("method.head.prototypes")
    metrics = load_curves(run.path / "metrics.csv", prototypes if isinstance(prototypes, int) else None)
    if metrics.curves:
        sections.tell(TRAINING, metrics.how)
    else:
        sections.miss(TRAINING, "There is no metrics.csv with a number in it: `ssl-vit pretrain` writes it.")
    return metrics


def _tell_gallery(gallery: Gallery, sections: _Sections) -> None:
    if gallery.attended:
        sections.tell(ATTENTION, gallery.how)
    elif gallery.how:
        sections.miss(ATTENTION, "The model has no class token, whose attention could be shown.")
    sections.tell(MASKS, gallery.how_masked)
    sections.miss(MASKS, gallery.unmasked)


def _features(run: RunFolder, config: ReportConfig, sections: _Sections) -> tuple[Rows, FeatureMap | None]:
    """Return the neighbors and the feature map, from the same features."""
    known: FeatureImages | None = sections.attempt(NEIGHBORS, lambda: known_images(run, config), None)
    if known is None:
        sections.miss(PLANE, sections.missing[NEIGHBORS])
        return Rows([], "", ""), None
    rows = sections.attempt(NEIGHBORS, lambda: neighbor_rows(known, config.k), Rows([], "", ""))
    sections.tell(NEIGHBORS, rows.how)
    points = sections.attempt(
        PLANE,
        lambda: embedding_map(known, points=config.points, projection=config.projection, seed=config.seed),
        None,
    )
    if points is not None:
        sections.tell(PLANE, points.text)
    return rows, points


def _panels(run: RunFolder, sections: _Sections) -> Panels:
    """Return the figures of `ssl-vit inspect`, then those logged during training."""
    command = f"`ssl-vit inspect checkpoint={escape_path(run.path)}`"
    try:
        inspected = read_inspection(run.path / "inspect", run.loaded)
    except UserError as error:
        inspected = Panels([], [], "", str(error))
    if inspected.problem:
        inspected = inspected._replace(problem=f"{inspected.problem} {command}")
    drawn = along_the_run(run.path / "images")
    both = Panels(
        [*inspected.inside, *drawn.inside],
        [*inspected.reconstructions, *drawn.reconstructions],
        inspected.how,
        " ".join(filter(None, (inspected.problem, drawn.problem))),
    )
    sections.tell(INSIDE, both.how)
    sections.miss(INSIDE, both.problem)
    if run.value("method.reconstruction.enabled") and not both.reconstructions:
        sections.miss(RECONSTRUCTIONS, f"There are no drawings of reconstructions. {command}")
    return both


def _health(damaged: int, names: set[str]) -> str:
    said = f"The run judges its own metrics as it trains: {', '.join(sorted(names))}." if names else ""
    return said + (f" {damaged:,} lines of its journals cannot be read." if damaged else "")


def _tell_numbers(run: RunFolder, sections: _Sections, *, some: bool) -> None:
    place = escape_path(run.path)
    commands = {
        "knn": f"`ssl-vit knn checkpoint={place} data.root=LABELED`",
        "linear": f"`ssl-vit linear checkpoint={place} data.root=LABELED`",
        "attention": f"`ssl-vit attention checkpoint={place} images=FOLDER masks=FOLDER out={place}/attention`",
    }
    measured = {record.task for record in run.records if record.score.metrics}
    wanted = [command for task, command in commands.items() if task not in measured]
    texts = [run.problems.get("headlines", "")]
    if wanted:
        texts.append(f"Not measured yet: {', '.join(wanted)}.")
    sections.miss(NUMBERS, " ".join(filter(None, texts)))
    if some:
        sections.tell(
            NUMBERS,
            "From the records of the evaluations, which hold their whole protocols. Intervals are of 95 %: Wilson's "
            "for shares of test images, else as it says beside them; they are of other test images, not of other "
            "pretrainings. Baselines were measured on the same images by the same protocol. "
            "Top-5 and other measures of masks than their IoU stand in the records.",
        )
