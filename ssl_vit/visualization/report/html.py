"""Render the report as one HTML file without external resources."""

from __future__ import annotations

from importlib.resources import files
from itertools import groupby
from typing import Any

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup, escape

from ssl_vit.evaluation.segmentation.iou import pool_mask_to_patches
from ssl_vit.visualization.image_grid import COLOR_MAP
from ssl_vit.visualization.overlays import MIN_SCALE_MAX
from ssl_vit.visualization.report.encode import (
    encode_array,
    encode_figure,
    encode_maps,
    encode_photo,
    encode_sprite,
    outline_path,
)
from ssl_vit.visualization.report.report_data import EmbeddingMap, GalleryImage, MetricRow, ReportData
from ssl_vit.visualization.report.svg_charts import interval_chart, line_chart

PHOTO_SIDE = 360  # pixels of an image that maps or masks are drawn over
NEIGHBOR_SIDE = 96
FIGURE_SIDE = 1300
SCRIPTS = ("report.js", "gallery.js", "masks.js", "embedding_map.js")


def render(report: ReportData) -> str:
    """Render a report as the text of one HTML file.

    The same report gives the same text. Empty parts are omitted, and `missing` is listed at the end. In metadata,
    remarks, health warnings, texts of figures, `protocol` and `missing`, words between backticks are set as code.
    Values are finite.

    Returns:
        Text that can be written as UTF-8: bytes of file names that are no UTF-8 are escaped as in JSON.
    """
    gallery = sorted(report.gallery, key=lambda image: image.ious[-1] if image.ious else -1.0, reverse=True)
    main = [row for row in report.metrics if row.level == "main"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssl_vit.visualization.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"outline": outline_path, "code": _code, "grouped": _group}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    page = environment.get_template("template.html").render(
        report=report,
        sections=_sections(report),
        style=Markup(_read("report.css")),
        script=Markup("\n".join(map(_read, SCRIPTS))),
        data=_script_data(report, gallery),
        interval_chart=interval_chart(main) if main else "",
        curves=[(curve.title, line_chart(curve)) for curve in report.curves],
        gallery=[(each, encode_photo(each.image, PHOTO_SIDE)) for each in gallery],
        has_ground_truth=any(each.ground_truth is not None for each in gallery),
        masks=[(each, encode_photo(each.image, PHOTO_SIDE)) for each in report.masks],
        neighbors=[[(each, encode_photo(each.image, NEIGHBOR_SIDE)) for each in row] for row in report.neighbors],
        figures=[(figure, encode_figure(figure.image, FIGURE_SIDE)) for figure in report.figures],
        config=yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True) if report.config else "",
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _sections(report: ReportData) -> dict[str, str]:
    """Return the titles of the sections with content, by their id in the page."""
    sections = {
        "metrics": ("Numbers", report.metrics),
        "gallery": ("Attention", report.gallery),
        "masks": ("Masks", report.masks),
        "neighbors": ("Neighbors", report.neighbors),
        "embedding-map": ("Feature map", report.embedding_map),
        "curves": ("Training", report.curves),
        "health": ("Health", True),  # that nothing was found is a finding
        "figures": ("Figures", report.figures),
        "protocol": ("How", report.protocol or report.config),
        "missing": ("Missing", report.missing),
    }
    return {key: title for key, (title, content) in sections.items() if content}


def _script_data(report: ReportData, gallery: list[GalleryImage]) -> dict[str, Any]:
    """Return the data that the scripts read."""
    ramp = matplotlib.colormaps[COLOR_MAP](np.arange(256), bytes=True)[:, :3]
    heads = max((len(image.maps) for image in gallery), default=0)
    return {
        "attentionMass": report.attention_mass,
        "minScaleMax": MIN_SCALE_MAX,
        "colors": encode_array(np.ascontiguousarray(ramp)),
        "heads": [f"head {head}" for head in range(heads)],
        "gallery": [_gallery_data(image) for image in gallery],
        "embeddingMap": _map_data(report.embedding_map) if report.embedding_map else None,
    }


def _gallery_data(image: GalleryImage) -> dict[str, Any]:
    levels, maxima = encode_maps(image.maps)
    _, rows, columns = image.maps.shape
    data = {"name": image.name, "rows": rows, "columns": columns, "maps": levels, "maxima": maxima, "groundTruth": None}
    if image.ground_truth is not None:
        counts = pool_mask_to_patches(image.ground_truth, (rows, columns), image.valid)
        height, width = image.ground_truth.shape
        has_void = image.valid is not None and not image.valid.all()
        data["groundTruth"] = {
            "foreground": encode_array(counts.foreground.numpy().astype("<u4")),
            "valid": encode_array(counts.valid.numpy().astype("<u4")) if has_void else None,
            "height": height,
            "width": width,
            "outline": outline_path(image.ground_truth),
        }
    return data


def _map_data(features: EmbeddingMap) -> dict[str, Any]:
    """Return the points in a square of side 1 with the aspect kept, and their thumbnails."""
    low, high = features.points.amin(dim=0), features.points.amax(dim=0)
    span = (high - low).max().clamp(min=1e-12)
    points = (features.points - (low + high) / 2) / span + 0.5  # (N, 2)
    return {
        "x": [round(x, 4) for x in points[:, 0].tolist()],
        "y": [round(1 - y, 4) for y in points[:, 1].tolist()],
        "labels": features.labels.tolist(),
        "classes": features.classes,
        "names": features.names,
        "sprite": encode_sprite(features.images),
    }


def _group(rows: list[MetricRow]) -> list[list[MetricRow]]:
    """Return the rows in groups that were measured together."""
    return [list(group) for _, group in groupby(rows, lambda row: (row.task, row.data, row.interval, row.n))]


def _code(text: str) -> Markup:
    """Return a text with the parts between backticks set as code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 and number < len(parts) - 1 else escape(part)
        for number, part in enumerate(parts)
    )


def _read(name: str) -> str:
    return files("ssl_vit.visualization.report").joinpath(name).read_text(encoding="utf-8")
