"""What every inspection ends as: a drawing with a title and words on how to read it."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image


class Panel(NamedTuple):
    """A drawing with what it shows."""

    title: str
    image: Image.Image  # RGB
    text: str  # how to read it; it is also what is read out in the drawing's place
