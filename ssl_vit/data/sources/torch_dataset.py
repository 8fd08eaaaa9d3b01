"""Images of a user's own `torch.utils.data.Dataset`."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ssl_vit.data.dataset import JPEGScaleFn, UnreadableImageError, evenly_spaced
from ssl_vit.runtime.errors import UserError

_FINGERPRINTED = 16  # images hashed where a fingerprint must be quick


class TorchDataset:
    """An `ImageDataset` over a map-style dataset, whose items are images or (image, label) pairs.

    An image is a PIL image, a uint8 tensor (H, W) or (C, H, W), or a uint8 array (H, W), (H, W, C) or (C, H, W),
    C = 1 or 3, without augmentation. Labels are integers; `targets` (a list, as torchvision's datasets have it) saves
    reading every item for its label, and `classes` gives their names.

    Raises:
        UserError: The dataset is empty or not map-style, or an item is neither an image nor an (image, label) pair.
    """

    def __init__(self, dataset: Dataset[Any] | Tensor) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise UserError(f"{type(dataset).__name__}: a map-style dataset with __len__ and __getitem__ is needed")
        self.dataset: Any = dataset
        self.root = Path(f"python:{type(dataset).__name__}")  # stands for `data.root` in configurations and results
        self._count = len(self.dataset)
        if not self._count:
            raise UserError(f"{type(dataset).__name__} is empty")
        first = self.dataset[0]
        self._labeled = isinstance(first, tuple | list)
        _to_array(self._image_of(first), f"item 0 of {type(dataset).__name__}")
        self.labels = self._read_labels()
        known = sorted({label for label in self.labels.tolist() if label >= 0})
        names = getattr(dataset, "classes", None)
        self.classes = [str(name) for name in names or range(max(known, default=-1) + 1)]

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """Return the name of an image in lists and messages."""
        return f"item {index}"

    def read(self, index: int, channels: int, shrink: JPEGScaleFn | None = None) -> Tensor:
        """Return an image (C, H, W) uint8: gray for 1 channel, RGB for 3.

        Raises:
            UnreadableImageError: The dataset raises an error for this item, or gives something else than an image.
        """
        try:
            image = self._image_of(self.dataset[index])
            array = _to_array(image, self.name(index))
        except (OSError, ValueError, UserError) as error:
            raise UnreadableImageError(self.name(index), str(error)) from error
        pixels = torch.from_numpy(np.asarray(Image.fromarray(array).convert("L" if channels == 1 else "RGB")).copy())
        return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()

    def content(self, index: int) -> bytes:
        """Return an image as the bytes of a PNG."""
        file = io.BytesIO()
        pixels = self.read(index, 3)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
        return file.getvalue()

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """Return a hash of the number of images and their pixels: of all with `sizes` or `times`, else of a few."""
        digest = hashlib.sha256(f"{type(self.dataset).__qualname__} {self._count}".encode())
        indices = range(self._count) if sizes or times else evenly_spaced(self._count, _FINGERPRINTED).tolist()
        for index in indices:
            try:
                pixels = self.read(index, 3)
                digest.update(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
            except UnreadableImageError:
                digest.update(b"unreadable")
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """Return one line: how many images of which dataset."""
        return f"{self._count:,} images of {type(self.dataset).__name__}"

    def _image_of(self, item: object) -> object:
        return item[0] if isinstance(item, tuple | list) else item

    def _read_labels(self) -> Tensor:
        targets = getattr(self.dataset, "targets", None)
        if targets is None and self._labeled:
            targets = [self.dataset[index][1] for index in range(self._count)]
        if targets is None:
            return torch.full((self._count,), -1)
        try:
            return torch.tensor([int(label) for label in targets], dtype=torch.int64)
        except (TypeError, ValueError) as error:
            raise UserError(f"{type(self.dataset).__name__}: labels must be integers: {error}") from None


def _to_array(image: object, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image as (H, W) or (H, W, 3) uint8.

    Raises:
        UserError: It is none.
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    array = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
    channels_first = isinstance(image, Tensor) or (array.ndim == 3 and array.shape[2] not in (1, 3))
    if array.dtype != np.uint8:
        raise UserError(f"{name}: an image must be uint8 in [0, 255], got {array.dtype}; remove ToTensor and Normalize")
    if array.ndim == 3 and channels_first:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise UserError(
            f"{name}: an image has 1 or 3 channels and the shape (H, W), (C, H, W) or (H, W, C), got {array.shape}"
        )
    return np.ascontiguousarray(array)
