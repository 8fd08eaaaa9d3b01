"""Ground-truth masks of a folder: matched to images by name, read as foreground, background and void pixels."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ssl_vit.config.visualize import MaskValuesConfig
from ssl_vit.data.annotations.mask_pairs import MaskPairs
from ssl_vit.data.annotations.mask_pixels import StoredValues, read_values
from ssl_vit.data.annotations.mask_values import FolderLookup, FolderValues, ForegroundMask, has_void, read_foreground
from ssl_vit.data.dataset import UnreadableImageError, evenly_spaced
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.runtime.text import pluralize
from ssl_vit.runtime.workers import map_threads

_SAMPLE = 32  # masks that are read to see whether 255 is void in a folder
_RIM = 0.7  # least share of the image's border in the foreground of an inverted mask
_INVERT = "use mask_values={foreground:[0],void:[]}"


class MissingMaskError(Exception):
    """An image without usable ground truth; the text gives the reason."""


class Annotation(NamedTuple):
    """Ground truth of one image."""

    foreground: Tensor  # (H, W) bool: the pixels of all objects; those of their boxes where there are no masks
    valid: Tensor  # (H, W) bool: all pixels but the void ones
    boxes: Tensor  # (boxes, 4) int64: left, top, right, bottom in pixels; right and bottom exclusive
    instances: Tensor | None  # (objects, H, W) bool: one mask per object; None without instance masks
    has_masks: bool  # False if there are boxes only


def annotation_from_mask(mask: Tensor, valid: Tensor | None = None) -> Annotation:
    """Build the annotation of a foreground mask (H, W) bool, with boxes around its connected components."""
    valid = torch.ones_like(mask) if valid is None else valid
    return Annotation(mask, valid, component_boxes(mask), instances=None, has_masks=True)


class MaskFolder:
    """Masks of the images of a folder; see `MaskPairs` for their names and `read_foreground` for their values.

    Args:
        folder: Searched recursively; it may be the folder of the images.
        images: The images, if masks may be among them.
        mask_values: Which values are foreground and void; None: by the rules of `read_foreground`.

    Raises:
        UserError: The folder does not exist or has no mask, or it is not clear which files are masks.
    """

    def __init__(
        self, folder: Path, images: ImageFolder | None = None, mask_values: MaskValuesConfig | None = None
    ) -> None:
        self.pairs = MaskPairs(folder, images)
        self._mask_values = mask_values
        self._notes: Counter[str] = Counter()
        self._noted: set[str] = set()  # images

    def read(self, name: str, size: tuple[int, int]) -> Tensor:
        """Return the foreground (H, W) bool of an image; see `annotation`."""
        return self.annotation(name, size).foreground

    def annotation(self, name: str, size: tuple[int, int]) -> Annotation:
        """Read the mask of the image with this relative name, height and width.

        Raises:
            MissingMaskError: The mask is missing, unreadable or empty, or differs in size from its image.
            UserError: Its values do not tell what is foreground.
        """
        given = self._mask_values
        try:
            path = self.pairs.find(name)
            values = (given.foreground, given.void) if given else (None, ())
            folder = FolderLookup(lambda: self._folder_values, lambda: self._has_void)
            mask = read_foreground(path, folder, *values)
        except FileNotFoundError as error:
            raise MissingMaskError(str(error)) from None
        except UnreadableImageError as error:
            raise MissingMaskError(f"the mask cannot be read: {error.reason}") from None
        check_size((mask.foreground.shape[0], mask.foreground.shape[1]), size)
        if not mask.foreground.any():
            raise MissingMaskError("the mask holds no object: it has no pixel of the foreground")
        if name not in self._noted:
            self._noted.add(name)
            self._notes.update(_remarks(mask))
        foreground, void = torch.from_numpy(mask.foreground), torch.from_numpy(mask.void)
        return annotation_from_mask(foreground, ~void)

    def notes(self) -> list[str]:
        """Return how the masks read so far were understood where it is not plain, with their numbers."""
        return [f"{pluralize(count, 'mask')}: {text}" for text, count in self._notes.items()]

    @cached_property
    def _has_void(self) -> bool:
        paths = self.pairs.paths
        return any(map(has_void, self._read([paths[index] for index in evenly_spaced(len(paths), _SAMPLE).tolist()])))

    @staticmethod
    def _read(paths: list[Path]) -> list[StoredValues]:
        """Read all masks that can be read."""

        def read(index: int) -> StoredValues | None:
            try:
                return read_values(paths[index])
            except UnreadableImageError:
                return None

        stored = map_threads(read, len(paths), label="reading masks", show=True)
        return [file for file in stored if file is not None]

    @cached_property
    def _folder_values(self) -> FolderValues:
        files = self._read(self.pairs.paths)
        soft = [file.is_lossy or file.is_soft for file in files]
        exact = [np.unique(file.values).tolist() for file, is_soft in zip(files, soft, strict=True) if not is_soft]
        top: dict[float, float] = {}
        for file, is_soft in zip(files, soft, strict=True):
            if is_soft:
                top[file.white] = max(top.get(file.white, 0.0), float(file.values.max()))
        return FolderValues(set().union(*exact), any(soft), top)


def _remarks(mask: ForegroundMask) -> list[str]:
    """Return what a reader of the scores must know about how one mask was read."""
    remarks = []
    if mask.reading == "soft":
        remarks.append("more than two values, cut in the middle of their range (above 127 of 255, where white is 255)")
    if mask.reading == "labels":
        remarks.append("more than two values, all labels but 0 are foreground; mask_values= selects some")
    if mask.reading == "binary" and len(mask.values) == 2 and mask.values[0]:
        remarks.append(f"{mask.values[1]:g} is foreground and {mask.values[0]:g} is not; mask_values= selects another")
    if mask.void.any():
        remarks.append("255 is void and excluded" if mask.reading != "values" else "the void values are excluded")
    if (mask.foreground | mask.void).all():
        remarks.append("everything is foreground")
    rim = np.concatenate([mask.foreground[0], mask.foreground[-1], mask.foreground[:, 0], mask.foreground[:, -1]])
    if rim.mean() > _RIM and not mask.foreground.all():
        remarks.append(f"the foreground covers most of the image's border; if it is the background, {_INVERT}")
    return remarks


def check_size(mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Compare the heights and widths of a mask and its image.

    Raises:
        MissingMaskError: They differ.
    """
    if mask != image:
        turned = "; perhaps only one of them is turned by its EXIF orientation" if mask == image[::-1] else ""
        raise MissingMaskError(f"the mask has {mask[1]} x {mask[0]} pixels, its image {image[1]} x {image[0]}{turned}")


def component_boxes(mask: Tensor) -> Tensor:
    """Return boxes (n, 4) int64 around the 4-connected components of a mask (H, W) bool, the largest first.

    A box is left, top, right, bottom in pixels; right and bottom are exclusive.
    """
    labels, count = ndimage.label(mask.numpy())
    if not count:
        return torch.zeros(0, 4, dtype=torch.int64)
    sizes = torch.bincount(torch.from_numpy(labels).flatten().long(), minlength=count + 1)[1:]
    boxes = [[columns.start, rows.start, columns.stop, rows.stop] for rows, columns in ndimage.find_objects(labels)]
    return torch.tensor(boxes)[sizes.argsort(descending=True, stable=True)]
