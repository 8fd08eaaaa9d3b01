"""Small data sets, decoded once and kept in memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, JPEGScaleFn, SkippedImageLog, UnreadableImageError
from ssl_vit.runtime.launch import give_memory_back
from ssl_vit.runtime.workers import map_threads

_SAMPLE = 64  # images whose size stands for that of all
_SHARE = 0.5  # of a GPU's memory
_RESERVE = 2  # address space per estimated byte; memory is only taken as it is filled


class InMemoryImages:
    """Decoded images, side by side in one buffer that forked processes share without copying.

    Args:
        buffer: All pixels uint8, each image as (H, W, C); a broken one takes no place.
        sizes: Height and width of each image (N, 2), 0 for a broken one.
        channels: C.
        broken: Those that cannot be read, by index.
    """

    def __init__(self, buffer: Tensor, sizes: Tensor, channels: int, broken: dict[int, UnreadableImageError]) -> None:
        self.buffer = buffer
        self.sizes = sizes
        self.channels = channels
        self.broken = broken
        self.ends = (sizes.prod(dim=1) * channels).cumsum(0)  # (N,) in the buffer

    @property
    def good(self) -> Tensor:
        """Indices (M,) of the readable images, ascending."""
        return self.sizes[:, 0].nonzero().squeeze(1)

    def read(self, index: int, shrink: JPEGScaleFn | None = None) -> Tensor:
        """The image as (C, H, W) uint8, always whole.

        Raises:
            UnreadableImageError: It could not be read.
        """
        if index in self.broken:
            raise self.broken[index]
        height, width = self.sizes[index].tolist()
        end = int(self.ends[index])
        pixels = self.buffer[end - height * width * self.channels : end]
        return pixels.view(height, width, self.channels).permute(2, 0, 1)

    def as_one(self) -> Tensor | None:
        """All readable images as (M, C, H, W), if they are of one size."""
        sizes = self.sizes[self.good]
        if not len(sizes) or (sizes != sizes[0]).any():
            return None
        height, width = sizes[0].tolist()
        return self.buffer.view(len(sizes), height, width, self.channels).permute(0, 3, 1, 2)


def cache_in_memory(
    dataset: ImageDataset, channels: int, *, budget: int, skipped: SkippedImageLog, show: bool
) -> InMemoryImages | None:
    """Decode all images into memory, if they fit.

    Whether they do is estimated from a sample, so that a huge folder costs no time, and found out while filling.

    Args:
        dataset: To be decoded.
        channels: 1 or 3.
        budget: Most bytes to take.
        skipped: Takes the broken ones.
        show: Whether to show progress when it takes long.
    """
    expected = _estimated_bytes(dataset, channels)
    if expected > budget:
        return None
    buffer = torch.empty(min(budget, _RESERVE * expected), dtype=torch.uint8)
    sizes = torch.zeros(len(dataset), 2, dtype=torch.int64)
    broken: dict[int, UnreadableImageError] = {}
    used = 0
    read = partial(_read, dataset, channels)
    for index, image in enumerate(map_threads(read, len(dataset), label="into memory", show=show)):
        if isinstance(image, UnreadableImageError):
            broken[index] = image
            skipped.record(image)
            continue
        if used + image.numel() > len(buffer):
            del buffer
            give_memory_back()
            return None
        buffer[used : used + image.numel()] = image.permute(1, 2, 0).flatten()
        used += image.numel()
        sizes[index] = torch.tensor(image.shape[1:])
    return InMemoryImages(buffer[:used], sizes, channels, broken)


def place_on_device(images: Tensor, device: torch.device) -> Tensor:
    """The images where they are cropped: on the device, if they take no more than half of its memory.

    Not of what is free at the moment: the same run would be cropped here one time and there another.
    """
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[1] * _SHARE:
        return images
    return images.to(device)


def _estimated_bytes(dataset: ImageDataset, channels: int) -> int:
    """What all images take decoded, from the mean of an even sample; 0 if none of these can be read."""
    count = min(_SAMPLE, len(dataset))
    places = torch.linspace(0, len(dataset) - 1, count).long().tolist()
    sample = map_threads(lambda i: _read(dataset, channels, places[i]), count, label="sizes", show=False)
    sizes = [image.numel() for image in sample if not isinstance(image, UnreadableImageError)]
    return len(dataset) * sum(sizes) // len(sizes) if sizes else 0


def _read(dataset: ImageDataset, channels: int, index: int) -> Tensor | UnreadableImageError:
    try:
        return dataset.read(index, channels)
    except UnreadableImageError as broken:
        return broken
