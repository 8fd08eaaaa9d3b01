"""Videos with object masks: DAVIS-2017 or custom frames, and masks of object IDs read from and written to files."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.data.annotations.mask_pixels import VOID, StoredValues
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import open_image, upright
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.path_lists import read_names
from ssl_vit.data.sources.video_frames import FolderFrames, VideoFrames
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError

RESOLUTION = "480p"
FPS = 24  # of DAVIS
_MAX_OBJECTS = 32  # a gray mask of more values has the soft edges of resizing or compression


class Clip(NamedTuple):
    """One video and its masks."""

    name: str
    frames: FolderFrames | VideoFrames
    masks: MaskSequence


class Mask(NamedTuple):
    """Object IDs of one frame."""

    ids: Tensor  # (H, W) int64; 0 is background, 255 void
    palette: list[int] | None  # 256 x RGB, if the file has one
    binary: bool  # whether 255 in the file was read as object 1


class MaskSequence:
    """The masks of one video: a folder with the frames' names and any suffix, or a file for the first frame only.

    Raises:
        UserError: The file or folder does not exist, or the folder has no image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, Path] = {}
        if not path.is_file():
            dataset = scan_image_folder(path)
            self._files = {_frame_key(dataset.name(index)): dataset.path(index) for index in range(len(dataset))}

    @property
    def has_multiple(self) -> bool:
        """Whether there are masks to evaluate on besides the first."""
        return len(self._files) > 1

    def find(self, name: str, *, first: bool) -> Path | None:
        """Return the mask file of the frame with this name, if there is one."""
        return self._files.get(_frame_key(name)) if self._files else (self.path if first else None)


def davis_clips(root: Path, split: str) -> list[Clip]:
    """Open the videos of a split of DAVIS-2017.

    Raises:
        UserError: The layout is different, or a video of the split is missing.
    """
    listed = root / "ImageSets" / "2017" / f"{split}.txt"
    if not listed.is_file():
        raise UserError(
            f"davis={root}: there is no {listed.relative_to(root)}; DAVIS-2017 has ImageSets/2017/{split}.txt, "
            f"JPEGImages/{RESOLUTION} and Annotations/{RESOLUTION}"
        )
    names = read_names(listed)
    if not names:
        raise UserError(f"{listed}: there is no video in this list")
    clips = []
    for name in names:
        frames, masks = (root / part / RESOLUTION / name for part in ("JPEGImages", "Annotations"))
        for folder in (frames, masks):
            if not folder.is_dir():
                raise UserError(f"davis={root}: {folder.relative_to(root)} is missing, but {split}.txt lists it")
        clips.append(Clip(name, FolderFrames(frames, FPS), MaskSequence(masks)))
    return clips


def read_mask(path: Path, *, binary: bool | None = None) -> Mask:
    """Read the object IDs of a palette or gray image of any supported format: the stored values, not the colors.

    `binary` says whether 255 is object 1 instead of void; None: if the file has no value but 0 and 255.

    Raises:
        UnreadableImageError: The file cannot be read, or has colors instead of IDs.
    """
    with open_image(path) as opened:
        opened.load()
        is_jpeg, image = opened.format == "JPEG", upright(opened)
        if image.mode not in ("1", "P", "L", "I", "I;16"):
            raise UnreadableImageError(path.name, f"a mask of mode {image.mode}; expected object IDs, palette or gray")
        palette = image.getpalette() if image.mode == "P" else None  # may end after the last color in use
        array = np.array(image).astype(np.int64)
        is_soft = is_jpeg or (
            len(np.unique(array)) > _MAX_OBJECTS and StoredValues(array, VOID, image.mode == "P", False).is_soft
        )
    values = torch.from_numpy((array > VOID // 2) * VOID if is_soft else array)
    if values.max() > VOID:
        raise UnreadableImageError(path.name, f"a mask with the number {values.max()}; object IDs are 1 to 254")
    if binary is None:
        binary = set(object_ids(values)) <= {0, VOID}
    if palette:
        palette += default_palette()[len(palette) :]
    return Mask(values.where(values != VOID, 1) if binary else values, palette, binary)


def object_ids(ids: Tensor) -> list[int]:
    """Return the distinct values of a mask, ascending, background and void included."""
    return torch.bincount(ids.flatten()).nonzero().flatten().tolist()


def write_mask(path: Path, ids: Tensor, palette: list[int] | None) -> None:
    """Write object IDs (H, W) from 0 to 254 as a palette PNG."""
    image = Image.fromarray(ids.to(torch.uint8).numpy()).convert("P")
    image.putpalette(palette or default_palette())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def default_palette() -> list[int]:
    """Return the 256 RGB colors of PASCAL VOC and DAVIS: the bits of each ID distributed over the channels.

    >>> default_palette()[:12]
    [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    """
    return [
        sum(((number >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for number in range(256)
        for channel in range(3)
    ]


def _frame_key(name: str) -> str:
    """Return what a frame and its mask have in common: the name without suffix, numbers without leading zeros."""
    stem = str(PurePosixPath(name).with_suffix(""))
    return str(int(stem)) if stem.isdecimal() else stem
