"""What a loading process does: batches of views for training, batches of whole images for evaluation."""

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
    """Views, cropped image by image; an error of the user's comes as a batch, which `TrainingLoader` raises.

    Args:
        read: Given an index and `shrink=` (see `Shrink`), the image as (C, H, W) uint8, or raises UnreadableImageError.
        labels: Of all images (N,).
        channels: C.
        multicrop: Makes the views.
        skipped: Takes the broken images.
        augment: What is done to a batch besides, in place.
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
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, picks: list[SampleKey]) -> Batch | UserError:
        """The batch of these images; in place of a broken one, the next good one."""
        wanted, key = torch.tensor(picks).unbind(1)  # (B,) each
        draws = self.multicrop.draw(key)
        shapes = self.multicrop.shapes(len(picks), self.channels)
        global_views, local_views = (torch.empty(shape, dtype=torch.uint8) for shape in shapes)
        found = []
        try:
            for place, index in enumerate(wanted.tolist()):
                views = [*global_views[place], *local_views[place]]
                found.append(self.first_readable(index, partial(self._cut, draws, place, views)))
        except UserError as error:
            return error
        index = torch.tensor(found)
        batch = Batch(global_views, local_views, self.labels[index], index, key)
        return self.augment(batch) if self.augment else batch

    def _cut(self, draws: CropParams, place: int, views: Sequence[Tensor], index: int) -> None:
        """Fill the views at a place of the batch from the image of this index."""
        cut = self.multicrop.cut(draws, place)
        cut.into(self.read(index, shrink=cut.shrink), views)

    def first_readable(self, wanted: int, use: Callable[[int], object]) -> int:
        """The index of the first image from `wanted` on that can be used; behind the last comes the first.

        Raises:
            UserError: There is none.
        """
        for step in range(len(self)):
            index = (wanted + step) % len(self)
            if index in self._broken:
                continue
            try:
                use(index)
                return index
            except UnreadableImageError as broken:
                self._broken.add(index)
                self.skipped.record(broken)
        raise UserError(f"none of the {len(self):,} images can be read; {self.skipped.path} says why")


class EvalBatch(NamedTuple):
    """Whole images, transformed for evaluation."""

    dataset: Tensor  # (B, C, S, S) uint8, without the broken ones
    indices: Tensor  # (B,) int64
    broken: list[UnreadableImageError]


class EvalDataset(Dataset[EvalBatch]):
    """Images in their order, transformed but not normalized."""

    def __init__(self, dataset: ImageDataset, transform: EvalTransform, *, channels: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.channels = channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> EvalBatch:
        """The batch of these images."""
        size = self.transform.image_size
        dataset = torch.empty(len(indices), self.channels, size, size, dtype=torch.uint8)
        good: list[int] = []
        broken: list[UnreadableImageError] = []
        for index in indices:
            try:
                dataset[len(good)] = self.transform(self.dataset.read(index, self.channels))
                good.append(index)
            except UnreadableImageError as error:
                broken.append(error)
        return EvalBatch(dataset[: len(good)], torch.tensor(good, dtype=torch.int64), broken)
