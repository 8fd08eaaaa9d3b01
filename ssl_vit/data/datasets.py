"""What a loading process does: batches of views for training, batches of whole pictures for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_vit.data.pictures import BrokenPicture, Pictures, SkippedPictures
from ssl_vit.data.sampler import Pick
from ssl_vit.errors import UserError
from ssl_vit.transforms.batch import Batch
from ssl_vit.transforms.boxes import Draws
from ssl_vit.transforms.crops import MultiCrop
from ssl_vit.transforms.evaluation import EvalTransform


class CroppedPictures(Dataset[Batch | UserError]):
    """Views, cropped picture by picture; an error of the user's comes as a batch, which `TrainingLoader` raises.

    Args:
        read: Given an index and `shrink=` (see `Shrink`), the picture as (C, H, W) uint8, or raises BrokenPicture.
        labels: Of all pictures (N,).
        channels: C.
        multicrop: Makes the views.
        skipped: Takes the broken pictures.
        augment: What is done to a batch besides, in place.
    """

    def __init__(
        self,
        read: Callable[..., Tensor],
        labels: Tensor,
        *,
        channels: int,
        multicrop: MultiCrop,
        skipped: SkippedPictures,
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

    def __getitems__(self, picks: list[Pick]) -> Batch | UserError:
        """The batch of these pictures; in place of a broken one, the next good one."""
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

    def _cut(self, draws: Draws, place: int, views: Sequence[Tensor], index: int) -> None:
        """Fill the views at a place of the batch from the picture of this index."""
        cut = self.multicrop.cut(draws, place)
        cut.into(self.read(index, shrink=cut.shrink), views)

    def first_readable(self, wanted: int, use: Callable[[int], object]) -> int:
        """The index of the first picture from `wanted` on that can be used; behind the last comes the first.

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
            except BrokenPicture as broken:
                self._broken.add(index)
                self.skipped.record(broken)
        raise UserError(f"none of the {len(self):,} pictures can be read; {self.skipped.path} says why")


class WholeBatch(NamedTuple):
    """Whole pictures, transformed for evaluation."""

    pictures: Tensor  # (B, C, S, S) uint8, without the broken ones
    indices: Tensor  # (B,) int64
    broken: list[BrokenPicture]


class WholePictures(Dataset[WholeBatch]):
    """Pictures in their order, transformed but not normalised."""

    def __init__(self, pictures: Pictures, transform: EvalTransform, *, channels: int) -> None:
        self.pictures = pictures
        self.transform = transform
        self.channels = channels

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, indices: list[int]) -> WholeBatch:
        """The batch of these pictures."""
        size = self.transform.image_size
        pictures = torch.empty(len(indices), self.channels, size, size, dtype=torch.uint8)
        good: list[int] = []
        broken: list[BrokenPicture] = []
        for index in indices:
            try:
                pictures[len(good)] = self.transform(self.pictures.read(index, self.channels))
                good.append(index)
            except BrokenPicture as error:
                broken.append(error)
        return WholeBatch(pictures[: len(good)], torch.tensor(good, dtype=torch.int64), broken)
