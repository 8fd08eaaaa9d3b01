"""Collect the report from a run directory: each section separately, so that one that fails leaves the others whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ssl_vit.config.visualize import ReportConfig
from ssl_vit.data.dataset import escape_path
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.report.feature_images import embedding_map, load_feature_images, neighbor_rows
from ssl_vit.visualization.report.figures import read_inspection, read_logged_figures
from ssl_vit.visualization.report.gallery import make_gallery
from ssl_vit.visualization.report.metric_rows import metric_rows
from ssl_vit.visualization.report.report_data import ReportData
from ssl_vit.visualization.report.run_metadata import load_health_warnings, run_caption, run_metadata
from ssl_vit.visualization.report.run_reader import RunContent, read_run
from ssl_vit.visualization.report.training_curves import load_curves

# Sections, as `protocol` and `missing` name them.
METRICS, TRAINING, HEALTH, ATTENTION, MASKS = "Numbers", "Training", "Health", "Attention", "Masks"
NEIGHBORS, EMBEDDING_MAP, FIGURES, CONFIG = "Neighbors", "Feature map", "Figures", "Configuration"


def collect_report(config: ReportConfig, command: str) -> ReportData:
    """Collect everything that a page shows of a run.

    Args:
        config: Configuration of the command.
        command: The command that makes the report.
    """
    run = read_run(config.run, config.weights)
    report = ReportData(
        title=escape_path(str(run.value("run.name") or run.path.resolve().name)),
        caption=run_caption(run),
        metadata=run_metadata(run, command),
        attention_mass=config.attention_mass,
        config=run.config,
        missing={CONFIG: run.problems.get("config", "")},
    )
    _add_metrics(report, run)
    _add_training(report, run)
    _add_gallery(report, run, config)
    _add_features(report, run, config)
    _add_figures(report, run)
    report.protocol = {section: text for section, text in report.protocol.items() if text}
    report.missing = {section: text for section, text in report.missing.items() if text}
    return report


@contextmanager
def _note_missing(report: ReportData, *sections: str) -> Iterator[None]:
    """Note why sections cannot be made, and continue with the others."""
    try:
        yield
    except UserError as error:
        report.missing |= dict.fromkeys(sections, str(error))


def _add_metrics(report: ReportData, run: RunContent) -> None:
    report.metrics = metric_rows(run)
    texts = [run.problems.get("results", "")]
    if not report.metrics:
        path = escape_path(run.path)
        texts.append(
            f"Nothing is measured yet: `ssl-vit knn checkpoint={path} data.root=LABELED` evaluates the features, "
            f"`ssl-vit attention checkpoint={path} images=FOLDER masks=FOLDER out={path}/attention` the attention; "
            "`ssl-vit` lists all evaluations."
        )
    else:
        report.protocol[METRICS] = (
            "From the results of the evaluations, which hold their whole protocols. Intervals are of 95 %: Wilson's "
            "for shares of test images, else as it says beside them; they are of other test images, not of other "
            "pretrainings. Baselines were measured on the same images by the same protocol. "
            "Top-5 and other measures of masks than their IoU stand in the results."
        )
    report.missing[METRICS] = " ".join(filter(None, texts))


def _add_training(report: ReportData, run: RunContent) -> None:
    prototypes = run.value("method.head.prototypes")
    report.curves, protocol = load_curves(run.path / "metrics.csv", prototypes if isinstance(prototypes, int) else None)
    if report.curves:
        report.protocol[TRAINING] = protocol
    else:
        report.missing[TRAINING] = "There is no metrics.csv with a number in it: `ssl-vit pretrain` writes it."
    report.health_warnings, damaged = load_health_warnings(run.path)
    names = ", ".join(sorted({warning.name for warning in report.health_warnings}))
    found = f"The run checks its own metrics as it trains: {names}." if names else ""
    unreadable = f"{damaged:,} lines of its journals cannot be read." if damaged else ""
    report.protocol[HEALTH] = " ".join(filter(None, (found, unreadable)))


def _add_gallery(report: ReportData, run: RunContent, config: ReportConfig) -> None:
    with _note_missing(report, ATTENTION):
        gallery = make_gallery(run, config)
        report.gallery, report.masks = gallery.images, gallery.masks
        if gallery.images:
            report.protocol[ATTENTION] = gallery.protocol
        else:
            report.missing[ATTENTION] = "The model has no class token, whose attention could be shown."
        report.protocol[MASKS] = gallery.mask_protocol
        report.missing[MASKS] = gallery.missing_masks


def _add_features(report: ReportData, run: RunContent, config: ReportConfig) -> None:
    """Add the neighbors and the feature map, from the same features."""
    with _note_missing(report, NEIGHBORS, EMBEDDING_MAP):
        images = load_feature_images(run, config)
        with _note_missing(report, NEIGHBORS):
            report.neighbors, report.neighbors_text, report.protocol[NEIGHBORS] = neighbor_rows(images, config.k)
        with _note_missing(report, EMBEDDING_MAP):
            report.embedding_map = embedding_map(images, config)
            report.protocol[EMBEDDING_MAP] = report.embedding_map.text


def _add_figures(report: ReportData, run: RunContent) -> None:
    """Add the figures of `ssl-vit inspect`, then those logged during training."""
    inspected, report.protocol[FIGURES], problems = read_inspection(run.path / "inspect", run.loaded)
    if problems:
        problems.append(f"`ssl-vit inspect checkpoint={escape_path(run.path)}`")
    logged, unreadable = read_logged_figures(run.path / "images")
    report.figures = [*inspected, *logged]
    report.missing[FIGURES] = " ".join([*problems, *unreadable])
