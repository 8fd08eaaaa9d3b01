"""Figures of a run directory: those of `ssl-vit inspect`, and those logged during training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import open_image
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.analysis.analysis_result import INSPECT_JSON
from ssl_vit.visualization.image_grid import TitledFigure

SIDE = 1300  # pixels of the longer side
RECONSTRUCTION = "reconstruction"  # how the names of such drawings begin
TEXTS = {
    "attention": "Fixed images, the mean of the last block's heads and each head; outlined is the mask of each map.",
    RECONSTRUCTION: "Fixed images, how they were corrupted, what the model made of them, and how far off it is.",
}


class Panels(NamedTuple):
    """Drawings, how they were made, and what is wrong with others."""

    inside: list[TitledFigure]
    reconstructions: list[TitledFigure]
    how: str
    problem: str


def read_inspection(folder: Path, loaded: LoadedBackbone | None) -> Panels:
    """Read the figures that the folder's inspect.json lists.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    try:
        content = json.loads((folder / INSPECT_JSON).read_text(encoding="utf-8"))
        entries = [(str(entry["file"]), str(entry["title"]), str(entry["text"])) for entry in content["figures"]]
    except FileNotFoundError:
        raise UserError("The model has not been inspected.") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{folder / INSPECT_JSON} is damaged: inspect again.") from None
    inside: list[TitledFigure] = []
    reconstructions: list[TitledFigure] = []
    problems = []
    for name, title, text in entries:
        try:
            panel = TitledFigure(title, _read(folder / Path(name).name), text)
        except UnreadableImageError as error:
            problems.append(str(error))
            continue
        (reconstructions if name.startswith(RECONSTRUCTION) else inside).append(panel)
    if loaded is not None and _is_of_another(content, loaded):
        problems.append("The drawings are of another checkpoint than this page shows: inspect again.")
    if _images(content) == 0:
        problems.append("The model was inspected without images: inspect again with images=FOLDER.")
    return Panels(inside, reconstructions, _how(content), " ".join(problems))


def along_the_run(folder: Path) -> Panels:
    """Read the first and the last figure of each kind that the run logged during training, from its folder `images`."""
    found: dict[str, list[TitledFigure]] = {kind: [] for kind in TEXTS}
    problems = []
    for kind, text in TEXTS.items():
        steps = {int(match[1]): file for file in folder.glob("*.jpg") if (match := _step(kind).fullmatch(file.name))}
        for step in sorted({min(steps), max(steps)} if steps else ()):
            try:
                image = _read(steps[step])
            except UnreadableImageError as error:
                problems.append(str(error))
                continue
            found[kind].append(TitledFigure(f"{kind.capitalize()} after {step:,} steps", image, text))
    return Panels(found["attention"], found[RECONSTRUCTION], "", " ".join(problems))


def _step(kind: str) -> re.Pattern[str]:
    return re.compile(rf"{kind}-(\d+)\.jpg")


def _read(path: Path) -> Image.Image:
    with open_image(path) as file:
        image = file.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def _is_of_another(content: dict[str, Any], loaded: LoadedBackbone) -> bool:
    """Whether it says so."""
    model = content.get("model")
    said = model.get("state_sha256") if isinstance(model, dict) else None
    return said is not None and said != loaded.backbone.state_sha256()


def _how(content: dict[str, Any]) -> str:
    """Return the protocol that the file states, in one line."""
    count = _images(content)
    texts = [f"Of {count:,} images"] if count else []
    for key, before in (("protocol", ""), ("skipped", "Not drawn: ")):
        said = content.get(key)
        texts += [f"{before}`{name}`: {text}" for name, text in said.items()] if isinstance(said, dict) else []
    return f"{'. '.join(texts)}." if texts else ""


def _images(content: dict[str, Any]) -> int | None:
    """How many it says there were."""
    data = content.get("images")
    count = data.get("count") if isinstance(data, dict) else None
    return count if isinstance(count, int) else None
