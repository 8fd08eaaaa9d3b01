"""Datasets that make whole batches in worker processes: crops for training, transformed images for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_vit.data.batch import Batch
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, UnreadableImageError
from ssl_vit.data.loading.batch_sampler import SampleKey
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.data.transforms.random_resized_crop import CropParams
from ssl_vit.runtime.errors import UserError


class MultiCropDataset(Dataset[Batch | UserError]):
    """Batches of views, cropped image by image; a UserError is returned as a batch, for `TrainingLoader` to raise.

    Args:
        read: Decodes the image of an index to (C, H, W) uint8 as `ImageDataset.read`, with `jpeg_scale=`.
        labels: Of all images (N,).
        channels: C.
        multicrop: Makes the views.
        skipped: Logs unreadable images.
        augment: Further augmentation of a batch, in place.
    """

    def __init__(
        self,
        read: Callable[..., Tensor],
        labels: Tensor,
        *,
        channels: int,
        multicrop: MultiCrop,
        skipped: SkippedImageLog,
        augment: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.augment = augment
        self.read = read
        self.labels = labels
        self.channels = channels
        self.multicrop = multicrop
        self.skipped = skipped
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, samples: list[SampleKey]) -> Batch | UserError:
        """Return the batch of these samples; an unreadable image is replaced by the next readable one."""
        requested, key = torch.tensor(samples).unbind(1)  # (B,) each
        params = self.multicrop.sample_params(key)
        shapes = self.multicrop.view_shapes(len(samples), self.channels)
        global_views, local_views = (torch.empty(shape, dtype=torch.uint8) for shape in shapes)
        indices = []
        try:
            for row, index in enumerate(requested.tolist()):
                views = [*global_views[row], *local_views[row]]
                indices.append(self.first_readable(index, partial(self._crop, params, row, views)))
        except UserError as error:
            return error
        index = torch.tensor(indices)
        batch = Batch(global_views, local_views, self.labels[index], index, key)
        return self.augment(batch) if self.augment else batch

    def _crop(self, params: CropParams, row: int, views: Sequence[Tensor], index: int) -> None:
        """Fill the views of a row of the batch from the image of this index."""
        plan = self.multicrop.plan(params, row)
        plan.crop_into(self.read(index, jpeg_scale=plan.jpeg_scale), views)

    def first_readable(self, start: int, use: Callable[[int], object]) -> int:
        """Call `use` with `start` and the following indices, cyclically, until an image can be read; return its index.

        Raises:
            UserError: No image can be read.
        """
        for step in range(len(self)):
            index = (start + step) % len(self)
            if index in self._unreadable:
                continue
            try:
                use(index)
                return index
            except UnreadableImageError as error:
                self._unreadable.add(index)
                self.skipped.record(error)
        raise UserError(f"none of the {len(self):,} images can be read; {self.skipped.path} lists the reasons")


class EvalBatch(NamedTuple):
    """Whole images, transformed for evaluation."""

    images: Tensor  # (B, C, S, S) uint8, without the unreadable ones
    indices: Tensor  # (B,) int64
    unreadable: list[UnreadableImageError]


class EvalDataset(Dataset[EvalBatch]):
    """Batches of transformed, not normalized images."""

    def __init__(self, dataset: ImageDataset, transform: EvalTransform, *, channels: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.channels = channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> EvalBatch:
        """Return the batch of these images."""
        size = self.transform.image_size
        images = torch.empty(len(indices), self.channels, size, size, dtype=torch.uint8)
        readable: list[int] = []
        unreadable: list[UnreadableImageError] = []
        for index in indices:
            try:
                images[len(readable)] = self.transform(self.dataset.read(index, self.channels))
                readable.append(index)
            except UnreadableImageError as error:
                unreadable.append(error)
        return EvalBatch(images[: len(readable)], torch.tensor(readable, dtype=torch.int64), unreadable)
