"""Images of a user's own `torch.utils.data.Dataset`."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ssl_vit.data.dataset import ImageDataset, JPEGScaleFn, UnreadableImageError, evenly_spaced
from ssl_vit.data.sources.decode import to_tensor
from ssl_vit.runtime.errors import UserError

_FINGERPRINTED = 16  # images hashed where a fingerprint must be quick


class TorchDataset(ImageDataset):
    """The images of a map-style dataset whose items are images or (image, label) pairs.

    An image is a PIL image, a uint8 tensor (H, W) or (C, H, W), or a uint8 array (H, W), (H, W, C) or (C, H, W),
    C = 1 or 3, without augmentation. Labels are integers; `targets` (a list, as torchvision's datasets have it) saves
    reading every item for its label, and `classes` gives their names.

    Raises:
        UserError: The dataset is empty or not map-style, or an item is neither an image nor an (image, label) pair.
    """

    def __init__(self, dataset: Dataset[Any] | Tensor) -> None:
        title = type(dataset).__name__
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise UserError(f"{title}: a map-style dataset with __len__ and __getitem__ is needed")
        self.dataset: Any = dataset
        self.root = Path(f"python:{title}")  # stands for `data.root` in configurations and results
        if not len(self.dataset):
            raise UserError(f"{title} is empty")
        first = self.dataset[0]
        _to_array(first, f"item 0 of {title}")
        self.labels = self._read_labels(labeled=isinstance(first, tuple | list))
        names = getattr(dataset, "classes", None)
        self.classes = [str(name) for name in names or range(max(0, int(self.labels.max()) + 1))]

    def name(self, index: int) -> str:
        return f"item {index}"

    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        try:
            array = _to_array(self.dataset[index], self.name(index))
        except (OSError, ValueError, UserError) as error:
            raise UnreadableImageError(self.name(index), str(error)) from error
        return to_tensor(Image.fromarray(array), channels).contiguous()

    def content(self, index: int) -> bytes:
        file = io.BytesIO()
        pixels = self.read(index, 3)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
        return file.getvalue()

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """Hash the number of images and their pixels: of all with `sizes` or `times`, else of a few."""
        digest = hashlib.sha256(f"{type(self.dataset).__qualname__} {len(self)}".encode())
        indices = range(len(self)) if sizes or times else evenly_spaced(len(self), _FINGERPRINTED).tolist()
        for index in indices:
            try:
                pixels = self.read(index, 3)
                digest.update(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
            except UnreadableImageError:
                digest.update(b"unreadable")
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        return f"{len(self):,} images of {type(self.dataset).__name__}"

    def _read_labels(self, *, labeled: bool) -> Tensor:
        targets = getattr(self.dataset, "targets", None)
        if targets is None and not labeled:
            return torch.full((len(self.dataset),), -1)
        try:
            items = (self.dataset[index][1] for index in range(len(self.dataset)))
            return torch.tensor([int(label) for label in (items if targets is None else targets)], dtype=torch.int64)
        except (TypeError, ValueError) as error:
            raise UserError(f"{type(self.dataset).__name__}: labels must be integers: {error}") from None


def _to_array(item: object, name: str) -> npt.NDArray[np.uint8]:
    """Return the image of an item as (H, W) or (H, W, 3) uint8, or raise a UserError."""
    image = item[0] if isinstance(item, tuple | list) else item
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
