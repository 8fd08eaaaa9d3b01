"""PASCAL VOC as it is unpacked: images of a list, masks of each object, and boxes.

VOCdevkit/VOC2012/
    JPEGImages/2007_000033.jpg
    SegmentationObject/2007_000033.png   palette; 0 background, 1, 2, ... one object each, 255 void
    Annotations/2007_000033.xml          boxes
    ImageSets/Segmentation/val.txt       images with masks, one name a line
    ImageSets/Main/trainval.txt          images with boxes, most of them without masks
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from ssl_vit.data.annotations.object_masks import VOID, Annotation, MissingMaskError, check_size, component_boxes
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import open_image
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.runtime.errors import UserError

SEGMENTATION, MAIN = "Segmentation", "Main"


class VOCDataset:
    """The images of one list and what is given of them.

    Args:
        root: `VOCdevkit/VOC2012`.
        split: A list in `ImageSets/Segmentation`, such as val: images with a mask per object. Or one of
            `ImageSets/Main`, such as Main/trainval: boxes alone, for CorLoc.

    Raises:
        UserError: There is no such folder or list, or the list is empty.
    """

    def __init__(self, root: Path, split: str) -> None:
        if not (root / "JPEGImages").is_dir():
            raise UserError(
                f"voc={root}: there is no JPEGImages/ in it; name the folder of one year, VOCdevkit/VOC2012"
            )
        path = PurePosixPath(split if "/" in split else f"{SEGMENTATION}/{split}")
        file = root / "ImageSets" / f"{path}.txt"
        if not file.is_file():
            lists = sorted(found.stem for found in (root / "ImageSets" / SEGMENTATION).glob("*.txt"))
            raise UserError(
                f"split={split}: there is no {file}; ImageSets/Segmentation has {', '.join(lists) or 'none'}"
            )
        names = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not names:
            raise UserError(f"split={split}: there is no name in {file}")
        self.root = root
        self.masked = path.parts[0] == SEGMENTATION
        self.dataset = ImageFolder(
            root / "JPEGImages",
            PackedPaths.pack(os.fsencode(f"{name}.jpg") for name in names),
            ignored=Counter(),
            labeled=False,
        )

    def annotation(self, name: str, size: tuple[int, int]) -> Annotation:
        """The objects of the image `<name>.jpg` with this height and width; boxes from masks where no XML is.

        Raises:
            MissingMaskError: There are no masks or boxes, they are broken or empty, or the mask has another size.
        """
        stem = PurePosixPath(name).stem
        xml = self.root / "Annotations" / f"{stem}.xml"
        boxes = read_boxes(xml) if xml.is_file() or not self.masked else None
        if not self.masked:
            assert boxes is not None
            return Annotation(_filled(boxes, size), torch.ones(size, dtype=torch.bool), boxes, None, masked=False)
        instances, void = _read_instances(self.root / "SegmentationObject" / f"{stem}.png", size)
        if boxes is None:
            boxes = torch.cat([component_boxes(instance)[:1] for instance in instances])
        return Annotation(instances.any(0), ~void, boxes, instances, masked=True)

    def remarks(self) -> list[str]:
        """Nothing: the layout says what all of it means."""
        return []


def read_boxes(path: Path) -> Tensor:
    """Boxes (n, 4) int64 of a VOC annotation file: left, top, right, bottom, the last two outside.

    Its pixels are counted from 1 and both ends belong to the box, so that (1, width) is the whole side. Difficult and
    truncated objects count, as in LOST's and TokenCut's CorLoc.

    Raises:
        MissingMaskError: The file cannot be read, or has no box.
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


def _filled(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels (H, W) bool within any box."""
    inside = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in boxes.tolist():
        inside[top:bottom, left:right] = True
    return inside


def _read_instances(path: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A mask per object (objects, H, W), and the void pixels (H, W), both bool."""
    if not path.is_file():
        raise MissingMaskError(f"there is no SegmentationObject/{path.name}")
    try:
        with open_image(path) as image:
            mode, values = image.mode, np.array(image)
    except UnreadableImageError as error:
        raise MissingMaskError(f"the mask cannot be read: {error.reason}") from None
    if mode not in ("P", "L"):
        raise MissingMaskError(f"SegmentationObject/{path.name} is {mode}: a palette of one index per object is needed")
    check_size(values.shape, size)
    labels = [label for label in np.unique(values) if label not in (0, VOID)]
    if not labels:
        raise MissingMaskError("the mask holds no object: all its pixels are background or void")
    return torch.from_numpy(np.stack([values == label for label in labels])), torch.from_numpy(values == VOID)
