"""Multi-crop: random resized crops and flips of uint8 images, global and local views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ssl_vit.config.methods import ViewsConfig
from ssl_vit.data.transforms.random_resized_crop import (
    Boxes,
    CropParams,
    batched_resized_crop,
    resolve_boxes,
    sample_crop_params,
    scale_boxes,
)
from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.rng import view_keys

_JPEG_SCALES = 8, 4, 2  # factors by which libjpeg decodes smaller, see `data.sources.decode`
_SMALL = 48  # pixels of images and views: up to here a CPU crops faster in batches than one by one
_CHUNK, _CHUNK_GPU = 16, 128  # images: what fits into a core's cache; what leaves most of a GPU's memory to the model


@dataclass(eq=False)
class CropPlan:
    """The crops of one image, which may be decoded smaller if they allow it; for one image only."""

    params: CropParams  # of its V views, each field (V, ...)
    sizes: Sequence[int]  # side of each view in pixels
    _full_size: tuple[int, int] | None = None  # height and width, set by `jpeg_scale`
    _scale: int = 1

    def jpeg_scale(self, height: int, width: int) -> int:
        """Return the largest factor 1, 2, 4 or 8 at which no box in an image of this size is smaller than its view."""
        self._full_size = height, width
        if min(height, width) >= _JPEG_SCALES[-1] * max(self.sizes):
            boxes = resolve_boxes(self.params, height, width)
            limit = int((torch.minimum(boxes.height, boxes.width) // torch.tensor(self.sizes)).min())
            self._scale = next((scale for scale in _JPEG_SCALES if scale <= limit), 1)
        return self._scale

    def crop_into(self, image: Tensor, views: Sequence[Tensor]) -> None:
        """Fill the views (C, S, S) from an image (C, H, W) of full size or decoded as `jpeg_scale` returned.

        In a smaller image box edges are rounded to its pixels. A view's pixels are never smaller than these, so the
        error is at most half a pixel of the view.
        """
        boxes = resolve_boxes(self.params, *(self._full_size or image.shape[1:]))
        if self._scale > 1:
            boxes = scale_boxes(boxes, self._scale)
        _crop_views(image, boxes, views)


class MultiCrop:
    """Global and local views of images; the same key gives the same boxes and flips in every method."""

    def __init__(self, views: ViewsConfig) -> None:
        self.flip = views.flip
        self.kinds = views.global_crops, views.local_crops
        self.sizes = [crops.size for crops in self.kinds for _ in range(crops.count)]

    def sample_params(self, keys: Tensor) -> CropParams:
        """Sample the crop parameters of the views (B, G + L) of samples with keys (B,), global views first."""
        big, small = self.kinds
        sampled = [
            sample_crop_params(view_keys(keys, first, crops.count), crops=crops, flip=self.flip)
            for crops, first in ((big, 0), (small, big.count))
        ]
        return CropParams(*(np.concatenate(parts, axis=1) for parts in zip(*sampled, strict=True)))

    def plan(self, params: CropParams, row: int) -> CropPlan:
        """Plan the crops of one image, the given row of batched parameters."""
        return CropPlan(CropParams(*(part[row] for part in params)), self.sizes)

    def view_shapes(self, count: int, channels: int) -> list[tuple[int, ...]]:
        """Return the shapes (B, G, C, S, S) of the global and (B, L, C, s, s) of the local views of `count` images."""
        return [(count, crops.count, channels, crops.size, crops.size) for crops in self.kinds]

    def crop_batch(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Crop the global views (B, G, C, S, S) and local views (B, L, C, s, s) of images (B, C, H, W), all uint8.

        All are on the device of the images, the keys (B,) int64 on the CPU, so that it does not wait for the device.
        Small images on the CPU, and all images on a GPU, are resampled in float; larger ones on the CPU in fixed
        point, as in `CropPlan.crop_into`: values may differ by one level.
        """
        count, channels, height, width = images.shape
        boxes = resolve_boxes(self.sample_params(keys), height, width)  # (B, V)
        on_cpu = images.device.type == "cpu"
        if on_cpu and max(height, width, *self.sizes) > _SMALL:
            views = [torch.empty(shape, dtype=torch.uint8) for shape in self.view_shapes(count, channels)]
            for image, *kinds, row in zip(images, *views, zip(*boxes, strict=True), strict=True):
                _crop_views(image, Boxes(*row), [view for kind in kinds for view in kind])
            return views[0], views[1]
        table = to_device_async(torch.stack(boxes, dim=1), images.device)  # (B, 5, V)
        chunk = _CHUNK if on_cpu else _CHUNK_GPU
        chunks = [
            self.crop_batch_matmul(part, Boxes(*rows.unbind(1)), cache_weights=on_cpu)
            for part, rows in zip(torch.split(images, chunk), torch.split(table, chunk), strict=True)
        ]
        global_views, local_views = map(torch.cat, zip(*chunks, strict=True))
        return global_views, local_views

    def crop_batch_matmul(self, images: Tensor, boxes: Boxes, *, cache_weights: bool = False) -> tuple[Tensor, Tensor]:
        """Crop the boxes (B, V) of images (B, C, H, W) uint8 with `batched_resized_crop`."""
        split = zip(*(torch.split(part, [crops.count for crops in self.kinds], dim=1) for part in boxes), strict=True)
        global_views, local_views = (
            batched_resized_crop(images, Boxes(*parts), size=crops.size, cache_weights=cache_weights)
            for crops, parts in zip(self.kinds, split, strict=True)
        )
        return global_views, local_views


def _crop_views(image: Tensor, boxes: Boxes, views: Iterable[Tensor]) -> None:
    """Fill each view (C, S, S) with its box (V,) of an image (C, H, W), resized like torchvision's resized_crop."""
    for *box, flip, view in zip(*(part.tolist() for part in boxes), views, strict=True):
        top, left, height, width = box
        crop = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
        resized = interpolate(crop, size=view.shape[1:], mode="bicubic", antialias=True)[0]
        view.copy_(resized.flip(-1) if flip else resized)
