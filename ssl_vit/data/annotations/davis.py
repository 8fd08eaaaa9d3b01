"""Videos with masks of objects: the layout of DAVIS-2017, or a user's own frames; masks read and written by number."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import open_image
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.video_frames import FolderFrames, Frames, open_frames
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError

VOID = 255  # pixels that count neither as object nor as background
JPEG_NOISE = 127  # lossy files have no exact zeros
RESOLUTION = "480p"


class Clip(NamedTuple):
    """One video and where its masks are."""

    name: str
    frames: Frames
    masks: MaskSequence


class Mask(NamedTuple):
    """Numbers of objects as a file holds them."""

    numbers: Tensor  # (H, W) int64; 0 is background, 255 void
    palette: list[int] | None  # 256 x RGB, of a file that has one
    binary: bool  # the file held 0 and 255 alone, and 255 became 1


class MaskSequence:
    """The masks of one video: a folder with the frames' names and any suffix, or the first frame's alone.

    Raises:
        UserError: There is no such file or folder, or no image in it.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._files: dict[str, Path] = {}
        if not place.is_file():
            dataset = scan_image_folder(place)
            self._files = {_key(dataset.name(index)): dataset.path(index) for index in range(len(dataset))}

    @property
    def several(self) -> bool:
        """Whether there may be masks to score by, besides the first."""
        return len(self._files) > 1

    def path(self, name: str, *, first: bool) -> Path | None:
        """The file of the frame with this name, if there is one."""
        return (self.place if first else None) if not self._files else self._files.get(_key(name))


def davis_clips(root: Path, split: str) -> list[Clip]:
    """The videos of a list of DAVIS-2017.

    Raises:
        UserError: The folder has another layout, or a video of the list is missing.
    """
    listed = root / "ImageSets" / "2017" / f"{split}.txt"
    if not listed.is_file():
        raise UserError(
            f"davis={root}: there is no {listed.relative_to(root)}; DAVIS-2017 holds ImageSets/2017/{split}.txt, "
            f"JPEGImages/{RESOLUTION} and Annotations/{RESOLUTION}"
        )
    names = listed.read_text(encoding="utf-8").split()
    if not names:
        raise UserError(f"{listed}: there is no video in this list")
    folders = [(root / "JPEGImages" / RESOLUTION / name, root / "Annotations" / RESOLUTION / name) for name in names]
    for folder in (folder for pair in folders for folder in pair):
        if not folder.is_dir():
            raise UserError(f"davis={root}: {split}.txt lists a video of which {folder.relative_to(root)} is missing")
    return [
        Clip(name, FolderFrames(frames, 24), MaskSequence(masks))
        for name, (frames, masks) in zip(names, folders, strict=True)
    ]


def own_clip(frames: Path, masks: Path) -> Clip:
    """A user's own video.

    Raises:
        UserError: There is no frame, or no mask.
    """
    return Clip(frames.resolve().stem, open_frames(frames, fps=24), MaskSequence(masks))


def read_mask(path: Path, *, binary: bool | None = None) -> Mask:
    """The numbers of the objects in a palette or gray image.

    Args:
        path: Of any of the formats that are read; the stored values count, not the colors.
        binary: Whether 255 means object 1, not void; None: it does where there is no other number but 0.

    Raises:
        UnreadableImageError: It cannot be read, or holds colors instead of numbers.
    """
    with open_image(path) as image:
        if image.mode not in ("1", "P", "L", "I", "I;16"):
            raise UnreadableImageError(
                path.name, f"a mask of mode {image.mode}: objects are numbers, in palette or gray files"
            )
        palette = image.getpalette() if image.mode == "P" else None  # may end behind the last color in use
        values = torch.from_numpy(np.array(image).astype(np.int64))
        if image.format == "JPEG":
            values = (values > JPEG_NOISE) * VOID
    if values.max() > VOID:
        raise UnreadableImageError(path.name, f"a mask with the number {values.max()}: objects are 1 to 254")
    if binary is None:
        binary = set(numbers_in(values)) <= {0, VOID}
    if palette:
        palette += default_palette()[len(palette) :]
    return Mask(values.where(values != VOID, 1) if binary else values, palette, binary)


def numbers_in(numbers: Tensor) -> list[int]:
    """Which numbers there are, ascending."""
    return torch.bincount(numbers.flatten()).nonzero().flatten().tolist()


def write_mask(path: Path, numbers: Tensor, palette: list[int] | None) -> None:
    """Numbers of objects (H, W), 0 to 254, as a palette PNG."""
    image = Image.fromarray(numbers.to(torch.uint8).numpy()).convert("P")
    image.putpalette(palette or default_palette())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def default_palette() -> list[int]:
    """256 x RGB: the colors of PASCAL VOC and DAVIS, in which each number's bits are dealt out to the channels.

    >>> default_palette()[:12]
    [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    """
    return [
        sum(((number >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for number in range(256)
        for channel in range(3)
    ]


def _key(name: str) -> str:
    """What a frame and its mask have in common: the name without suffix, a number without leading zeros."""
    stem = str(PurePosixPath(name).with_suffix(""))
    return str(int(stem)) if stem.isdecimal() else stem
