"""PASCAL VOC in its original layout: the images of a split with instance masks and boxes.

VOCdevkit/VOC2012/
    JPEGImages/2007_000033.jpg
    SegmentationObject/2007_000033.png   palette; 0 background, 1, 2, ... objects, 255 void
    Annotations/2007_000033.xml          boxes
    ImageSets/Segmentation/val.txt       images with masks, one name per line
    ImageSets/Main/trainval.txt          images with boxes, most of them without masks
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from ssl_vit.data.annotations.mask_pixels import VOID
from ssl_vit.data.annotations.object_masks import Annotation, MissingMaskError, check_size, component_boxes
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import open_image
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.data.sources.path_lists import read_names
from ssl_vit.runtime.errors import UserError

SEGMENTATION = "Segmentation"


class VOCDataset:
    """The images of one split and their annotations.

    A split is a file of `ImageSets/Segmentation`, such as val: images with instance masks. Or one of `ImageSets/Main`,
    such as Main/trainval: boxes only, for CorLoc.

    Raises:
        UserError: The folder or the split does not exist, or the split is empty.
    """

    def __init__(self, root: Path, split: str) -> None:
        if not (root / "JPEGImages").is_dir():
            raise UserError(f"voc={root} has no JPEGImages/; name the folder of one year, such as VOCdevkit/VOC2012")
        path = PurePosixPath(split if "/" in split else f"{SEGMENTATION}/{split}")
        file = root / "ImageSets" / f"{path}.txt"
        if not file.is_file():
            lists = sorted(found.stem for found in (root / "ImageSets" / SEGMENTATION).glob("*.txt"))
            raise UserError(
                f"split={split}: {file} does not exist; ImageSets/Segmentation has {', '.join(lists) or 'no split'}"
            )
        names = read_names(file)
        if not names:
            raise UserError(f"split={split}: no name in {file}")
        self.root = root
        self.has_masks = path.parts[0] == SEGMENTATION
        paths = PackedPaths.from_iterable(os.fsencode(f"{name}.jpg") for name in names)
        self.dataset = ImageFolder(root / "JPEGImages", paths)

    def annotation(self, name: str, size: tuple[int, int]) -> Annotation:
        """Read the annotation of the image `<name>.jpg`; without an XML file, boxes are computed from the masks.

        Raises:
            MissingMaskError: Masks or boxes are missing, unreadable or empty, or the mask differs in size.
        """
        stem = PurePosixPath(name).stem
        xml = self.root / "Annotations" / f"{stem}.xml"
        boxes = read_boxes(xml) if xml.is_file() or not self.has_masks else None
        if not self.has_masks:
            assert boxes is not None
            return Annotation(
                _fill_boxes(boxes, size), torch.ones(size, dtype=torch.bool), boxes, None, has_masks=False
            )
        instances, void = _read_instances(self.root / "SegmentationObject" / f"{stem}.png", size)
        if boxes is None:
            boxes = torch.cat([component_boxes(instance)[:1] for instance in instances])
        return Annotation(instances.any(0), ~void, boxes, instances, has_masks=True)

    def notes(self) -> list[str]:
        """Return no notes: the layout is unambiguous."""
        return []


def read_boxes(path: Path) -> Tensor:
    """Read the boxes (n, 4) int64 of a VOC annotation file: left, top, right, bottom; right and bottom exclusive.

    VOC counts pixels from 1 and both ends belong to the box. Difficult and truncated objects are included, as in the
    CorLoc of LOST and TokenCut.

    Raises:
        MissingMaskError: The file cannot be read or has no box.
    """
    try:
        tree = ElementTree.parse(path)
        corners = [
            [round(float(box.findtext(key, ""))) for key in ("xmin", "ymin", "xmax", "ymax")]
            for box in tree.iterfind("object/bndbox")
        ]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise MissingMaskError(f"{path.name} cannot be read: {error}") from None
    if not corners:
        raise MissingMaskError(f"{path.name} names no object")
    return torch.tensor(corners) - torch.tensor([1, 1, 0, 0])


def _fill_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the mask (H, W) bool of the pixels inside any box."""
    inside = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in boxes.tolist():
        inside[top:bottom, left:right] = True
    return inside


def _read_instances(path: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Read the instance masks (objects, H, W) and the void pixels (H, W), both bool."""
    if not path.is_file():
        raise MissingMaskError(f"there is no SegmentationObject/{path.name}")
    try:
        with open_image(path) as image:
            mode, values = image.mode, np.array(image)
    except UnreadableImageError as error:
        raise MissingMaskError(f"the mask cannot be read: {error.reason}") from None
    if mode not in ("P", "L"):
        raise MissingMaskError(
            f"SegmentationObject/{path.name} has mode {mode}; expected a palette mask, one index per object"
        )
    check_size(values.shape, size)
    labels = [label for label in np.unique(values) if label not in (0, VOID)]
    if not labels:
        raise MissingMaskError("the mask holds no object: all its pixels are background or void")
    return torch.from_numpy(np.stack([values == label for label in labels])), torch.from_numpy(values == VOID)
