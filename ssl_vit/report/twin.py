"""The report's other form: a JSON with all that the page says, but for its pictures."""

from __future__ import annotations

from typing import Any

from ssl_vit.records.record import finite
from ssl_vit.report.content import Content, FeatureMap

SCHEMA = 1  # grows when a key changes its meaning


def as_plain(content: Content) -> dict[str, Any]:
    """A report as plain containers that strict JSON can hold: what is no finite number is null."""
    plain = {
        "schema": SCHEMA,
        **content._asdict(),
        "headlines": [{**headline._asdict(), "rank": headline.rank.value} for headline in content.headlines],
        "curves": [curve._asdict() for curve in content.curves],
        "verdicts": [verdict._asdict() for verdict in content.verdicts],
        "attended": [{"name": seen.name, "heads": len(seen.maps), "ious": seen.ious} for seen in content.attended],
        "segmented": [{"name": picture.name, "ious": picture.ious} for picture in content.segmented],
        "neighbours": [
            [{"name": near.name, "label": near.label, "similarity": near.similarity} for near in row]
            for row in content.neighbours
        ],
        "feature_map": None if content.feature_map is None else _plane(content.feature_map),
        "panels": [{"title": panel.title, "text": panel.text} for panel in content.panels],
        "reconstructions": [{"title": panel.title, "text": panel.text} for panel in content.reconstructions],
    }
    strict: dict[str, Any] = finite(plain)
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
