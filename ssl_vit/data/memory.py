"""Small data sets, decoded once and kept in memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ssl_vit.data.parallel import in_threads
from ssl_vit.data.pictures import BrokenPicture, Pictures, Shrink, SkippedPictures
from ssl_vit.processes import give_memory_back

_SAMPLE = 64  # pictures whose size stands for that of all
_SHARE = 0.5  # of a GPU's memory
_RESERVE = 2  # address space per estimated byte; memory is only taken as it is filled


class DecodedPictures:
    """Decoded pictures, side by side in one buffer that forked processes share without copying.

    Args:
        buffer: All pixels uint8, each picture as (H, W, C); a broken one takes no place.
        sizes: Height and width of each picture (N, 2), 0 for a broken one.
        channels: C.
        broken: Those that cannot be read, by index.
    """

    def __init__(self, buffer: Tensor, sizes: Tensor, channels: int, broken: dict[int, BrokenPicture]) -> None:
        self.buffer = buffer
        self.sizes = sizes
        self.channels = channels
        self.broken = broken
        self.ends = (sizes.prod(dim=1) * channels).cumsum(0)  # (N,) in the buffer

    @property
    def good(self) -> Tensor:
        """Indices (M,) of the readable pictures, ascending."""
        return self.sizes[:, 0].nonzero().squeeze(1)

    def read(self, index: int, shrink: Shrink | None = None) -> Tensor:
        """The picture as (C, H, W) uint8, always whole.

        Raises:
            BrokenPicture: It could not be read.
        """
        if index in self.broken:
            raise self.broken[index]
        height, width = self.sizes[index].tolist()
        end = int(self.ends[index])
        pixels = self.buffer[end - height * width * self.channels : end]
        return pixels.view(height, width, self.channels).permute(2, 0, 1)

    def as_one(self) -> Tensor | None:
        """All readable pictures as (M, C, H, W), if they are of one size."""
        sizes = self.sizes[self.good]
        if not len(sizes) or (sizes != sizes[0]).any():
            return None
        height, width = sizes[0].tolist()
        return self.buffer.view(len(sizes), height, width, self.channels).permute(0, 3, 1, 2)


def decode_all(
    pictures: Pictures, channels: int, *, budget: int, skipped: SkippedPictures, show: bool
) -> DecodedPictures | None:
    """Decode all pictures into memory, if they fit.

    Whether they do is estimated from a sample, so that a huge folder costs no time, and found out while filling.

    Args:
        pictures: To be decoded.
        channels: 1 or 3.
        budget: Most bytes to take.
        skipped: Takes the broken ones.
        show: Whether to show progress when it takes long.
    """
    expected = _estimated_bytes(pictures, channels)
    if expected > budget:
        return None
    buffer = torch.empty(min(budget, _RESERVE * expected), dtype=torch.uint8)
    sizes = torch.zeros(len(pictures), 2, dtype=torch.int64)
    broken: dict[int, BrokenPicture] = {}
    used = 0
    read = partial(_read, pictures, channels)
    for index, picture in enumerate(in_threads(read, len(pictures), label="into memory", show=show)):
        if isinstance(picture, BrokenPicture):
            broken[index] = picture
            skipped.record(picture)
            continue
        if used + picture.numel() > len(buffer):
            del buffer
            give_memory_back()
            return None
        buffer[used : used + picture.numel()] = picture.permute(1, 2, 0).flatten()
        used += picture.numel()
        sizes[index] = torch.tensor(picture.shape[1:])
    return DecodedPictures(buffer[:used], sizes, channels, broken)


def home(images: Tensor, device: torch.device) -> Tensor:
    """The pictures where they are cropped: on the device, if they take no more than half of its memory.

    Not of what is free at the moment: the same run would be cropped here one time and there another.
    """
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[1] * _SHARE:
        return images
    return images.to(device)


def _estimated_bytes(pictures: Pictures, channels: int) -> int:
    """What all pictures take decoded, from the mean of an even sample; 0 if none of these can be read."""
    count = min(_SAMPLE, len(pictures))
    places = torch.linspace(0, len(pictures) - 1, count).long().tolist()
    sample = in_threads(lambda i: _read(pictures, channels, places[i]), count, label="sizes", show=False)
    sizes = [picture.numel() for picture in sample if not isinstance(picture, BrokenPicture)]
    return len(pictures) * sum(sizes) // len(sizes) if sizes else 0


def _read(pictures: Pictures, channels: int, index: int) -> Tensor | BrokenPicture:
    try:
        return pictures.read(index, channels)
    except BrokenPicture as broken:
        return broken
