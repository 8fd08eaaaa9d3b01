"""Given object masks: found by their images' names, read so that every non-zero pixel is object or void."""

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

JPEG_NOISE = 127  # lossy files have no exact zeros
VOID = 255  # as in PASCAL VOC: pixels that nobody decided on
HIGHEST_LABEL = 63  # of the labels of a gray mask beside which 255 is void; soft edges reach higher values as well


class MissingMaskError(Exception):
    """An image without a mask that it could be scored by; the text says why."""


class Annotation(NamedTuple):
    """What is given of one image."""

    object: Tensor  # (H, W) bool: the pixels of its objects; those of their boxes where there are no masks
    counted: Tensor  # (H, W) bool: all pixels but the void ones
    boxes: Tensor  # (boxes, 4) int64: left, top, right, bottom in pixels, the last two outside
    instances: Tensor | None  # (objects, H, W) bool: one mask per object; None where they are not told apart
    masked: bool  # whether masks are given, and not boxes alone


class AnnotationSource(Protocol):
    """What is given of images, by their names."""

    def annotation(self, name: str, size: tuple[int, int]) -> Annotation:
        """What is given of the image with this relative name and height and width.

        Raises:
            MissingMaskError: Nothing that it could be scored by.
        """
        ...

    def remarks(self) -> list[str]:
        """What a reader must know of how they were read."""
        ...


def annotate(mask: Tensor, counted: Tensor | None = None) -> Annotation:
    """What an object mask (H, W) bool says, with the pixels (H, W) that count; the boxes are those of its parts."""
    everything = torch.ones_like(mask) if counted is None else counted
    return Annotation(mask, everything, component_boxes(mask), instances=None, masked=True)


class MaskFolder:
    """A folder of masks that carry the images' relative names, with any suffix.

    Every non-zero pixel is object. In masks of labels, 255 is void: where it stands beside other labels in a palette,
    or in a gray mask whose other non-zero values all lie below 64. Masks of 0 and 255, and gray masks with soft edges,
    are not such: their 255 is object.

    Args:
        folder: Searched at every depth.

    Raises:
        UserError: There is no such folder, or no mask in it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"masks={folder}: there is no such folder")
        masks = scan_image_folder(folder)
        self._files = {_without_suffix(masks.name(index)): masks.path(index) for index in range(len(masks))}
        self._with_void: set[str] = set()

    def read(self, name: str, size: tuple[int, int]) -> Tensor:
        """The object (H, W) bool of the image with this relative name and height and width.

        Raises:
            MissingMaskError: There is none, it is broken or empty, or it has another size than its image.
        """
        return self.annotation(name, size).object

    def annotation(self, name: str, size: tuple[int, int]) -> Annotation:
        """As `read`, with the boxes of the object's parts, and without the void pixels.

        Raises:
            MissingMaskError: As for `read`.
        """
        path = self._files.get(_without_suffix(name))
        if path is None:
            raise MissingMaskError("no mask with this image's name")
        try:
            mask, void = _read_mask(path)
        except UnreadableImageError as error:
            raise MissingMaskError(f"the mask cannot be read: {error.reason}") from None
        check_size((mask.shape[0], mask.shape[1]), size)
        if not mask.any():
            raise MissingMaskError("the mask holds no object: all its pixels are zero")
        if void.any():
            self._with_void.add(name)
        return annotate(mask, ~void)

    def remarks(self) -> list[str]:
        """In how many of the masks that were read 255 was taken for void."""
        count = len(self._with_void)
        text = f"255 was taken for void, and left out, in {count} of the masks: they hold labels beside it"
        return [text] if count else []


def check_size(mask: tuple[int, int], picture: tuple[int, int]) -> None:
    """Compare heights and widths.

    Raises:
        MissingMaskError: They differ.
    """
    if mask != picture:
        raise MissingMaskError(f"the mask has {mask[1]} x {mask[0]} pixels, its image {picture[1]} x {picture[0]}")


def _without_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _read_mask(path: Path) -> tuple[Tensor, Tensor]:
    """Object and void (H, W) bool: palette indices stay indices, an alpha channel does not count."""
    with open_image(path) as image:
        values = np.asarray(image)
        threshold = JPEG_NOISE if image.format == "JPEG" else 0
        channels = len(image.getbands()) - image.mode.endswith("A")
        void = (
            values == VOID if threshold == 0 and _are_labels(values, image.mode) else np.zeros(values.shape[:2], bool)
        )
    colors = values.reshape(*values.shape[:2], -1)[..., :channels]
    return torch.from_numpy((colors > threshold).any(-1) & ~void), torch.from_numpy(void)


def _are_labels(values: npt.NDArray[np.generic], mode: str) -> bool:
    """Whether the values (H, W) of a mask of this mode are labels among which 255 is void."""
    if mode not in ("P", "L"):
        return False
    others = np.setdiff1d(values, [0, VOID])
    return bool(others.size and (mode == "P" or others.max() <= HIGHEST_LABEL))


def component_boxes(mask: Tensor) -> Tensor:
    """Boxes (n, 4) int64 around the parts of a mask (H, W) bool that touch by their sides, the largest part first.

    A box is left, top, right, bottom in pixels; right and bottom are the first ones outside.
    """
    labels, count = ndimage.label(mask.numpy())
    if not count:
        return torch.zeros(0, 4, dtype=torch.int64)
    sizes = torch.bincount(torch.from_numpy(labels).flatten().long(), minlength=count + 1)[1:]
    boxes = [[columns.start, rows.start, columns.stop, rows.stop] for rows, columns in ndimage.find_objects(labels)]
    return torch.tensor(boxes)[sizes.argsort(descending=True, stable=True)]
