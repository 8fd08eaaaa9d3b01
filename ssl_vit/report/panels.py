"""The drawings that `ssl-vit inspect` left in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ssl_vit.data.decode import opened
from ssl_vit.data.pictures import BrokenPicture
from ssl_vit.errors import UserError
from ssl_vit.report.content import Panel

SIDE = 1300  # pixels of the longer side


class Panels(NamedTuple):
    """Drawings, and what is wrong with others."""

    inside: list[Panel]
    reconstructions: list[Panel]
    problem: str


def read_panels(folder: Path) -> Panels:
    """Those that the folder's inspect.json lists.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    try:
        listed = json.loads((folder / "inspect.json").read_text(encoding="utf-8"))["panels"]
        entries = [(str(entry["file"]), str(entry["title"]), str(entry["text"])) for entry in listed]
    except FileNotFoundError:
        raise UserError("The network has not been inspected.") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{folder / 'inspect.json'} is damaged: inspect again.") from None
    inside: list[Panel] = []
    reconstructions: list[Panel] = []
    broken = []
    for name, title, text in entries:
        try:
            with opened(folder / Path(name).name) as file:
                image = file.convert("RGB")
        except BrokenPicture as error:
            broken.append(str(error))
            continue
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        (reconstructions if name.startswith("reconstruction") else inside).append(Panel(title, image, text))
    return Panels(inside, reconstructions, "; ".join(broken))
