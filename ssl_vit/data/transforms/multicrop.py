"""Random resized crops and flips of uint8 images: the geometric half of the views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ssl_vit.config.methods import ViewsConfig
from ssl_vit.data.transforms.random_resized_crop import (
    Boxes,
    CropParams,
    resolve_boxes,
    sample_crop_params,
    scale_boxes,
)
from ssl_vit.data.transforms.resize import batched_resized_crop, cached_bicubic_weights
from ssl_vit.data.transforms.separable_filter import bicubic_weights
from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.rng import view_keys

_SHRINKS = 8, 4, 2  # by which an image may be decoded smaller, see `data.decode`
_SMALL = 48  # pixels of images and views: up to here a CPU cuts many at once faster than one by one
_AT_ONCE, _AT_ONCE_GPU = 16, 128  # images: what fits a core's cache; what leaves a GPU's memory to the model


class CropPlan:
    """The views of one image, which may be decoded smaller if the boxes allow; for one image only.

    Args:
        draws: Of its views (V,).
        sizes: Of the views, in pixels.
    """

    def __init__(self, draws: CropParams, sizes: Sequence[int]) -> None:
        self.draws = draws
        self.sizes = sizes
        self._whole: tuple[int, int] | None = None  # its height and width, if `shrink` was asked
        self._shrink = 1

    def shrink(self, height: int, width: int) -> int:
        """The largest of 1, 2, 4, 8 by which this image may be shrunk and no box be smaller than its view.

        Args:
            height: Of the whole image, in pixels.
            width: Of the whole image, in pixels.
        """
        self._whole = height, width
        if min(height, width) >= _SHRINKS[-1] * max(self.sizes):
            boxes = resolve_boxes(self.draws, height, width)
            room = int((torch.minimum(boxes.height, boxes.width) // torch.tensor(self.sizes)).min())
            self._shrink = next((by for by in _SHRINKS if by <= room), 1)
        return self._shrink

    def into(self, image: Tensor, views: Sequence[Tensor]) -> None:
        """Fill the views (C, S, S) from the image (C, H, W), smaller by what `shrink` said if that was asked.

        In a smaller image the boxes' edges lie on its own pixels, at most half of one beside their true places. A
        view's pixels are never smaller than those, so that this is at most half a pixel of the view.
        """
        boxes = resolve_boxes(self.draws, *(self._whole or image.shape[1:]))
        if self._shrink > 1:
            boxes = scale_boxes(boxes, self._shrink)
        _cut_each(image, boxes, views)


class MultiCrop:
    """Global and local views of an image; the same key gives the same boxes and flips, however they are cut."""

    def __init__(self, views: ViewsConfig) -> None:
        self.views = views
        kinds = views.global_crops, views.local_crops
        self.sizes = [crops.size for crops in kinds for _ in range(crops.count)]

    def draw(self, keys: Tensor) -> CropParams:
        """What is random in the views (B, G + L) of samples (B,), the global ones first."""
        kinds = (self.views.global_crops, 0), (self.views.local_crops, self.views.global_crops.count)
        drawn = [
            sample_crop_params(view_keys(keys, first, crops.count), crops=crops, flip=self.views.flip)
            for crops, first in kinds
        ]
        return CropParams(*(np.concatenate(parts, axis=1) for parts in zip(*drawn, strict=True)))

    def cut(self, draws: CropParams, place: int) -> CropPlan:
        """The views of the image at a place (of B) of draws."""
        return CropPlan(CropParams(*(part[place] for part in draws)), self.sizes)

    def shapes(self, count: int, channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the global views (B, G, C, S, S) and the local views (B, L, C, s, s) of so many images."""
        big, small = self.views.global_crops, self.views.local_crops
        return (count, big.count, channels, big.size, big.size), (count, small.count, channels, small.size, small.size)

    def one(self, image: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Views of one image of any size.

        Args:
            image: (C, H, W) uint8.
            key: The sample's key, () int64.

        Returns:
            Global views (G, C, S, S) and local views (L, C, s, s), uint8.
        """
        views = [torch.empty(shape[1:], dtype=torch.uint8) for shape in self.shapes(1, len(image))]
        self.cut(self.draw(key[None]), 0).into(image, [*views[0], *views[1]])
        return views[0], views[1]

    def batch(self, dataset: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Views of images of one size, cut where these lie.

        Small images on the CPU and all on a GPU are resampled in float, larger ones on the CPU in fixed point, as in
        `one`: values may differ by one level.

        Args:
            dataset: (B, C, H, W) uint8, on any device.
            keys: The samples' keys (B,) int64, on the CPU, which does not wait for the device.

        Returns:
            Global views (B, G, C, S, S) and local views (B, L, C, s, s), uint8, on the images' device.
        """
        count, channels, height, width = dataset.shape
        boxes = resolve_boxes(self.draw(keys), height, width)  # (B, V)
        on_cpu = dataset.device.type == "cpu"
        if on_cpu and max(height, width, *self.sizes) > _SMALL:
            views = [torch.empty(shape, dtype=torch.uint8) for shape in self.shapes(count, channels)]
            for image, *kinds, own in zip(dataset, *views, zip(*boxes, strict=True), strict=True):
                _cut_each(image, Boxes(*own), [view for kind in kinds for view in kind])
            return views[0], views[1]
        table = to_device_async(torch.stack(boxes, dim=1), dataset.device)  # (B, 5, V)
        at_once = _AT_ONCE if on_cpu else _AT_ONCE_GPU
        made = [
            self.together(some, Boxes(*own.unbind(1)), look_up=on_cpu)
            for some, own in zip(torch.split(dataset, at_once), torch.split(table, at_once), strict=True)
        ]
        global_views, local_views = map(torch.cat, zip(*made, strict=True))
        return global_views, local_views

    def together(self, dataset: Tensor, boxes: Boxes, *, look_up: bool = False) -> tuple[Tensor, Tensor]:
        """Views of images (B, C, H, W) from boxes (B, V) on the same device, all at once.

        Args:
            dataset: uint8.
            boxes: The flips may be 0 and 1.
            look_up: Keep the weights of all boxes that an image of this size may have: for small ones only.
        """
        kinds = self.views.global_crops, self.views.local_crops
        counts = [crops.count for crops in kinds]
        split = zip(*(torch.split(part, counts, dim=1) for part in boxes), strict=True)
        weights = cached_bicubic_weights if look_up else bicubic_weights
        global_views, local_views = (
            batched_resized_crop(dataset, Boxes(*own), size=crops.size, weights=weights)
            for crops, own in zip(kinds, split, strict=True)
        )
        return global_views, local_views


def _cut_each(image: Tensor, boxes: Boxes, views: Iterable[Tensor]) -> None:
    """Fill each view (C, S, S) with its box (V,) of an image (C, H, W), as torchvision resizes a crop."""
    for *box, flip, view in zip(*(part.tolist() for part in boxes), views, strict=True):
        top, left, tall, wide = box
        part = image[None, :, top : top + tall, left : left + wide].contiguous(memory_format=torch.channels_last)
        resized = interpolate(part, size=view.shape[1:], mode="bicubic", antialias=True)[0]
        view.copy_(resized.flip(-1) if flip else resized)
