"""Figures of a run directory: those of `ssl-vit inspect`, and those logged during training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import open_image
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.visualization.analysis.analysis_result import INSPECT_JSON
from ssl_vit.visualization.image_grid import TitledFigure

SIDE = 1300  # pixels of the longer side
TEXTS = {
    "attention": "Fixed images, the mean of the last block's heads and each head; outlined is the mask of each map.",
    "reconstruction": "Fixed images, how they were corrupted, what the model made of them, and how far off it is.",
}


def read_inspection(folder: Path, loaded: LoadedBackbone | None) -> tuple[list[TitledFigure], str, list[str]]:
    """Read the figures that the folder's inspect.json lists; return also their protocol and what is wrong with them."""
    try:
        content = json.loads((folder / INSPECT_JSON).read_text(encoding="utf-8"))
        entries = [(str(entry["file"]), str(entry["title"]), str(entry["text"])) for entry in content["figures"]]
    except FileNotFoundError:
        return [], "", ["The model has not been inspected."]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return [], "", [f"{folder / INSPECT_JSON} is damaged: inspect again."]
    figures, problems = _read([(folder / Path(name).name, title, text) for name, title, text in entries])
    state = _section(content, "model").get("state_sha256")
    if loaded is not None and state is not None and state != loaded.backbone.state_sha256():
        problems.append("The drawings are of another checkpoint than this page shows: inspect again.")
    count = _section(content, "images").get("count")
    if count == 0:
        problems.append("The model was inspected without images: inspect again with images=FOLDER.")
    texts = [f"Of {count:,} images"] if isinstance(count, int) and count else []
    texts += [f"`{name}`: {text}" for name, text in _section(content, "protocol").items()]
    texts += [f"Not drawn: `{name}`: {text}" for name, text in _section(content, "skipped").items()]
    return figures, f"{'. '.join(texts)}." if texts else "", problems


def read_logged_figures(folder: Path) -> tuple[list[TitledFigure], list[str]]:
    """Read the first and the last figure of each kind that the run logged during training; return also problems."""
    steps: dict[str, list[tuple[int, Path]]] = {}
    for file in folder.glob("*.jpg"):
        if match := re.fullmatch(r"(.+)-(\d+)\.jpg", file.name):
            steps.setdefault(match[1], []).append((int(match[2]), file))
    return _read(
        [
            (file, f"{kind.replace('_', ' ').capitalize()} after {step:,} steps", TEXTS.get(kind, "Fixed images."))
            for kind, logged in sorted(steps.items())
            for step, file in sorted({min(logged), max(logged)})
        ]
    )


def _read(entries: list[tuple[Path, str, str]]) -> tuple[list[TitledFigure], list[str]]:
    """Read files with their titles and texts; return also what is wrong with those that cannot be read."""
    figures, problems = [], []
    for path, title, text in entries:
        try:
            with open_image(path) as file:
                image = file.convert("RGB")
        except UnreadableImageError as error:
            problems.append(str(error))
            continue
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        figures.append(TitledFigure(title, image, text))
    return figures, problems


def _section(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a section of inspect.json; empty if it is damaged."""
    section = content.get(key)
    return section if isinstance(section, dict) else {}
