"""Datasets decoded once into memory, if they fit, and the loader of those whose images have one size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ssl_vit.data.batch import Batch
from ssl_vit.data.dataset import ImageDataset, JPEGScaleFn, SkippedImageLog, UnreadableImageError
from ssl_vit.data.loading.batch_sampler import ResumableBatchSampler
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.launch import trim_malloc
from ssl_vit.runtime.workers import map_threads

_SAMPLE = 64  # images from which the size of all is estimated
_GPU_FRACTION = 0.5  # of a GPU's memory
_RESERVE = 2  # address space per estimated byte; memory is allocated only as it is filled


@dataclass(eq=False)
class InMemoryImages:
    """Decoded images in one buffer that forked processes share without copying."""

    buffer: Tensor  # uint8: the pixels of all readable images, each as (H, W, C)
    sizes: Tensor  # (N, 2) height and width of each image, 0 for an unreadable one
    channels: int
    unreadable: dict[int, UnreadableImageError]  # by index

    def __post_init__(self) -> None:
        self.ends = (self.sizes.prod(dim=1) * self.channels).cumsum(0)  # (N,) in the buffer

    @property
    def readable(self) -> Tensor:
        """Indices (M,) of the readable images, ascending."""
        return self.sizes[:, 0].nonzero().squeeze(1)

    def read(self, index: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        """Return the image as (C, H, W) uint8, always of full size.

        Raises:
            UnreadableImageError: It could not be read.
        """
        if index in self.unreadable:
            raise self.unreadable[index]
        height, width = self.sizes[index].tolist()
        end = int(self.ends[index])
        pixels = self.buffer[end - height * width * self.channels : end]
        return pixels.view(height, width, self.channels).permute(2, 0, 1)

    def stacked(self) -> Tensor | None:
        """Return all readable images as (M, C, H, W), or None if their sizes differ."""
        sizes = self.sizes[self.readable]
        if not len(sizes) or (sizes != sizes[0]).any():
            return None
        height, width = sizes[0].tolist()
        return self.buffer.view(len(sizes), height, width, self.channels).permute(0, 3, 1, 2)


@dataclass(eq=False)
class InMemoryLoader:
    """Batches of crops from in-memory images of one size, on the device of the images, without the CPU waiting for it.

    Labels, indices and keys stay on the CPU.
    """

    images: Tensor  # (M, C, H, W) uint8: the readable images, on the CPU or a GPU
    readable: Tensor  # (M,) their indices, ascending; an unreadable image is replaced by the next readable one
    labels: Tensor  # (N,) of all images
    multicrop: MultiCrop
    batch_sampler: ResumableBatchSampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        for samples in self.batch_sampler:
            requested, key = torch.tensor(samples).T.contiguous().unbind(0)  # (B,) each
            row = torch.searchsorted(self.readable, requested) % len(self.readable)
            images = self.images.index_select(0, to_device_async(row, self.images.device))
            global_views, local_views = self.multicrop.crop_batch(images, key)
            index = self.readable[row]
            yield Batch(global_views, local_views, self.labels[index], index, key)


def cache_in_memory(
    dataset: ImageDataset, channels: int, *, budget: int, skipped: SkippedImageLog, show: bool
) -> InMemoryImages | None:
    """Decode all images into memory; return None if they take more than `budget` bytes.

    The size is first estimated from a sample, so that a huge folder costs no time, then checked while decoding.
    """
    expected = _estimate_bytes(dataset, channels)
    if expected > budget:
        return None
    buffer = torch.empty(min(budget, _RESERVE * expected), dtype=torch.uint8)
    sizes = torch.zeros(len(dataset), 2, dtype=torch.int64)
    unreadable: dict[int, UnreadableImageError] = {}
    used = 0
    read = partial(_try_read, dataset, channels)
    for index, image in enumerate(map_threads(read, len(dataset), label="into memory", show=show)):
        if isinstance(image, UnreadableImageError):
            unreadable[index] = image
            skipped.record(image)
            continue
        if used + image.numel() > len(buffer):
            del buffer
            trim_malloc()
            return None
        buffer[used : used + image.numel()] = image.permute(1, 2, 0).flatten()
        used += image.numel()
        sizes[index] = torch.tensor(image.shape[1:])
    return InMemoryImages(buffer[:used], sizes, channels, unreadable)


def place_on_device(images: Tensor, device: torch.device) -> Tensor:
    """Move the images to the device, unless they take more than half of a GPU's memory.

    Not half of its free memory: the same run would then crop on one device today and on another tomorrow.
    """
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[1] * _GPU_FRACTION:
        return images
    return images.to(device)


def _estimate_bytes(dataset: ImageDataset, channels: int) -> int:
    """Estimate the decoded size of all images from a sample; 0 if none of it can be read."""
    indices = torch.linspace(0, len(dataset) - 1, min(_SAMPLE, len(dataset))).long().tolist()
    sample = map_threads(lambda i: _try_read(dataset, channels, indices[i]), len(indices), label="sizes", show=False)
    sizes = [image.numel() for image in sample if not isinstance(image, UnreadableImageError)]
    return len(dataset) * sum(sizes) // len(sizes) if sizes else 0


def _try_read(dataset: ImageDataset, channels: int, index: int) -> Tensor | UnreadableImageError:
    try:
        return dataset.read(index, channels)
    except UnreadableImageError as error:
        return error
