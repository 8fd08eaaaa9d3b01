"""Given object masks: found by their pictures' names, read so that every non-zero pixel is object."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ssl_vit.data.decode import opened
from ssl_vit.data.files import folder_pictures
from ssl_vit.data.pictures import BrokenPicture
from ssl_vit.errors import UserError

JPEG_NOISE = 127  # lossy files have no exact zeros


class NoMask(Exception):  # noqa: N818 - no error of the program: the picture is counted and not scored
    """A picture without a mask that it could be scored by; the text says why."""


class MaskFolder:
    """A folder of masks that carry the pictures' relative names, with any suffix.

    Args:
        folder: Searched at every depth.

    Raises:
        UserError: There is no such folder, or no mask in it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"masks={folder}: there is no such folder")
        masks = folder_pictures(folder)
        self._files = {_without_suffix(masks.name(index)): masks.path(index) for index in range(len(masks))}

    def read(self, name: str, size: tuple[int, int]) -> Tensor:
        """The mask (H, W) bool of the picture with this relative name and height and width.

        Raises:
            NoMask: There is none, it is broken or empty, or it has another size than its picture.
        """
        path = self._files.get(_without_suffix(name))
        if path is None:
            raise NoMask("no mask with this picture's name")
        try:
            mask = _read_mask(path)
        except BrokenPicture as error:
            raise NoMask(f"the mask cannot be read: {error.reason}") from None
        if mask.shape != size:
            (height, width), (mask_height, mask_width) = size, mask.shape
            raise NoMask(f"the mask has {mask_width} x {mask_height} pixels, its picture {width} x {height}")
        if not mask.any():
            raise NoMask("the mask holds no object: all its pixels are zero")
        return mask


def _without_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _read_mask(path: Path) -> Tensor:
    """Non-zero pixels of the stored values: palette indices stay indices, an alpha channel does not count."""
    with opened(path) as image:
        values = np.asarray(image)
        threshold = JPEG_NOISE if image.format == "JPEG" else 0
        channels = len(image.getbands()) - image.mode.endswith("A")
    colours = values.reshape(*values.shape[:2], -1)[..., :channels]
    return torch.from_numpy((colours > threshold).any(-1))
