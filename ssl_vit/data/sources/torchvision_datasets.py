"""torchvision's CIFAR-10, CIFAR-100 and STL-10 as in-memory datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from ssl_vit.data.dataset import ImageDataset, JPEGScaleFn, escape_path
from ssl_vit.runtime.errors import UserError

ArraySource = Literal["cifar10", "cifar100", "stl10"]
Split = Literal["pretrain", "train", "test"]

_STL10_SPLITS = {"pretrain": "train+unlabeled", "train": "train", "test": "test"}
_CHUNK = 4096  # images converted to gray at once


@dataclass(eq=False)
class ArrayDataset(ImageDataset):
    """In-memory images of one size."""

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor
    classes: list[str]
    title: str  # name of the dataset and split

    def name(self, index: int) -> str:
        return f"{self.title} {index}"

    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        return self.images[index] if channels == 3 else rgb_to_gray(self.images[index])

    def content(self, index: int) -> bytes:
        return self.images[index].numpy().tobytes()

    def all(self, channels: int) -> Tensor:
        """Return all images as (N, C, H, W) uint8."""
        if channels == 3:
            return self.images
        return torch.cat([rgb_to_gray(chunk) for chunk in torch.split(self.images, _CHUNK)])

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """Return the title and length; torchvision has verified the files' published checksums."""
        return f"{self.title} ({len(self)})"

    def describe(self) -> str:
        height, width = self.images.shape[2:]
        return f"{len(self):,} images of {self.title}, {width} x {height} pixels"


def load_torchvision_dataset(source: ArraySource, root: Path, *, split: Split) -> ArrayDataset:
    """Read one of torchvision's datasets below `root`; `pretrain` is `train`, for STL-10 with the unlabeled images.

    Raises:
        UserError: Files are missing or damaged.
    """
    kind: type[CIFAR10] | type[STL10] = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}[source]
    _check_files(kind, source, root)
    title = f"{source} {split}"
    try:
        if source == "stl10":
            stl = STL10(root, split=_STL10_SPLITS[split])
            labels = torch.tensor(stl.labels).long()
            return ArrayDataset(torch.from_numpy(stl.data), labels, stl.classes, title=title)
        cifar = kind(root, train=split != "test")
    except RuntimeError as error:
        raise UserError(f"{source} in {escape_path(root.absolute())} is damaged: its checksums are wrong") from error
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
    return ArrayDataset(images, torch.tensor(cifar.targets), cifar.classes, title=title)


def rgb_to_gray(images: Tensor) -> Tensor:
    """Convert RGB (..., 3, H, W) to gray (..., 1, H, W), uint8: ITU-R 601 in 16-bit fixed point, as Pillow does."""
    red, green, blue = images.int().unbind(-3)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8).unsqueeze(-3)


def _check_files(kind: type[CIFAR10] | type[STL10], source: ArraySource, root: Path) -> None:
    folder = root / kind.base_folder
    required = [name for name, _ in kind.train_list + kind.test_list]
    required.append(kind.class_names_file if kind is STL10 else kind.meta["filename"])
    if missing := [name for name in required if not (folder / name).is_file()]:
        raise UserError(
            f"{source} is not in {escape_path(root.absolute())}: {escape_path(folder)} lacks {', '.join(missing)}. "
            "Unpack the official archive there (nothing is downloaded), or name its folder with data.root"
        )
