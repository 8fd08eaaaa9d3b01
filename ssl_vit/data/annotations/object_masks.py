"""Ground-truth masks of a folder: matched to images by name, read as foreground, background and void pixels."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import open_image
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.text import pluralize

JPEG_NOISE = 127  # lossy files have no exact zeros
VOID = 255  # unlabeled pixels, as in PASCAL VOC
MAX_LABEL = 63  # largest label of a gray mask in which 255 is void; soft edges reach higher values


class MissingMaskError(Exception):
    """An image without usable ground truth; the text gives the reason."""


class Annotation(NamedTuple):
    """Ground truth of one image."""

    foreground: Tensor  # (H, W) bool: the pixels of all objects; those of their boxes where there are no masks
    valid: Tensor  # (H, W) bool: all pixels but the void ones
    boxes: Tensor  # (boxes, 4) int64: left, top, right, bottom in pixels; right and bottom exclusive
    instances: Tensor | None  # (objects, H, W) bool: one mask per object; None without instance masks
    has_masks: bool  # False if there are boxes only


class AnnotationSource(Protocol):
    """Annotations by image name."""

    def annotation(self, name: str, size: tuple[int, int]) -> Annotation:
        """Return the annotation of the image with this relative name, height and width.

        Raises:
            MissingMaskError: There is no usable one.
        """
        ...

    def notes(self) -> list[str]:
        """Return what a reader of the results must know about how the masks were read."""
        ...


def annotation_from_mask(mask: Tensor, valid: Tensor | None = None) -> Annotation:
    """Build the annotation of a foreground mask (H, W) bool, with boxes around its connected components."""
    valid = torch.ones_like(mask) if valid is None else valid
    return Annotation(mask, valid, component_boxes(mask), instances=None, has_masks=True)


class MaskFolder:
    """A folder of masks with the images' relative names and any suffix.

    Every non-zero pixel is foreground. In label masks 255 is void: a palette mask with other labels besides 255, or a
    gray mask whose other non-zero values are all below 64. In masks of 0 and 255 and in gray masks with soft edges,
    255 is foreground.

    Args:
        folder: Searched recursively.

    Raises:
        UserError: The folder does not exist or has no mask.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"masks={folder}: there is no such folder")
        masks = scan_image_folder(folder)
        self._files = {_without_suffix(masks.name(index)): masks.path(index) for index in range(len(masks))}
        self._with_void: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return _without_suffix(name) in self._files

    def read(self, name: str, size: tuple[int, int]) -> Tensor:
        """Return the foreground (H, W) bool of an image; see `annotation`."""
        return self.annotation(name, size).foreground

    def annotation(self, name: str, size: tuple[int, int]) -> Annotation:
        """Read the mask of the image with this relative name, height and width.

        Raises:
            MissingMaskError: The mask is missing, unreadable or empty, or differs in size from its image.
        """
        path = self._files.get(_without_suffix(name))
        if path is None:
            raise MissingMaskError("no mask with this image's name")
        try:
            foreground, void = _read_mask(path)
        except UnreadableImageError as error:
            raise MissingMaskError(f"the mask cannot be read: {error.reason}") from None
        check_size((foreground.shape[0], foreground.shape[1]), size)
        if not foreground.any():
            raise MissingMaskError("the mask holds no object: all its pixels are zero")
        if void.any():
            self._with_void.add(name)
        return annotation_from_mask(foreground, ~void)

    def notes(self) -> list[str]:
        """Return in how many of the masks read so far 255 was void."""
        count = len(self._with_void)
        return [f"255 is void and excluded in {pluralize(count, 'label mask')}"] if count else []


def check_size(mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Compare the heights and widths of a mask and its image.

    Raises:
        MissingMaskError: They differ.
    """
    if mask != image:
        raise MissingMaskError(f"the mask has {mask[1]} x {mask[0]} pixels, its image {image[1]} x {image[0]}")


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


def _without_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _read_mask(path: Path) -> tuple[Tensor, Tensor]:
    """Read foreground and void (H, W) bool; palette masks give their indices, an alpha channel is ignored."""
    with open_image(path) as image:
        values = np.asarray(image)
        threshold = JPEG_NOISE if image.format == "JPEG" else 0
        channels = len(image.getbands()) - image.mode.endswith("A")
        is_label_mask = threshold == 0 and _is_label_mask(values, image.mode)
    void = values == VOID if is_label_mask else np.zeros(values.shape[:2], bool)
    colors = values.reshape(*values.shape[:2], -1)[..., :channels]
    return torch.from_numpy((colors > threshold).any(-1) & ~void), torch.from_numpy(void)


def _is_label_mask(values: npt.NDArray[np.generic], mode: str) -> bool:
    """Return whether the values (H, W) of a mask of this Pillow mode are labels among which 255 is void."""
    if mode not in ("P", "L"):
        return False
    others = np.setdiff1d(values, [0, VOID])
    return bool(others.size and (mode == "P" or others.max() <= MAX_LABEL))
