"""Data loaders for training (views) and evaluation (whole images); their datasets make whole batches in the workers."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_vit.config.pretrain import PretrainDataConfig, Workers
from ssl_vit.data.batch import Batch
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, UnreadableImageError
from ssl_vit.data.loading.batch_sampler import ResumableBatchSampler, SampleKey
from ssl_vit.data.loading.ram_cache import InMemoryLoader, cache_in_memory, place_on_device
from ssl_vit.data.sources.torchvision_datasets import ArrayDataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.data.transforms.random_resized_crop import CropParams
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import STOP_SIGNALS
from ssl_vit.runtime.text import pluralize
from ssl_vit.runtime.workers import resolve_num_workers

T = TypeVar("T")

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)


@dataclass(eq=False)
class MultiCropDataset(Dataset[Batch | UserError]):
    """Batches of views, cropped image by image; a UserError is returned as a batch, for `TrainingLoader` to raise."""

    read: Callable[..., Tensor]  # decodes the image of an index to (C, H, W) uint8, with `jpeg_scale=`
    labels: Tensor  # (N,) of all images
    channels: int
    multicrop: MultiCrop
    skipped: SkippedImageLog
    augment: Callable[[Batch], Batch] | None = None  # further augmentation of a batch, in place
    _unreadable: set[int] = field(default_factory=set, init=False)

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


class TrainingLoader(DataLoader[Batch | UserError]):
    """Batches from MultiCropDataset; raises a worker's UserError without the worker's traceback."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # torch promises its own iterator
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def build_train_loader(
    dataset: ImageDataset,
    multicrop: MultiCrop,
    config: PretrainDataConfig,
    *,
    seed: int,
    channels: int,
    rank: int,
    world: int,
    accumulate: int,
    first_step: int,
    skipped: SkippedImageLog,
    local_world: int | None = None,
    device: torch.device = _CPU,
    augment: Callable[[Batch], Batch] | None = None,
) -> InMemoryLoader | TrainingLoader:
    """Build the loader of training process `rank` of `world`; each iteration is one epoch.

    Images of one size that fit into memory are placed on the device, if they take at most half of its memory, and
    cropped there; others that fit are kept decoded and cropped by workers; the rest is read from disk by workers. The
    crops are the same in each case (to a pixel for JPEGs decoded at reduced size), and an unreadable image is replaced
    by the next readable one.

    After `first_step` optimizer steps of `accumulate` micro-batches the batches continue, within an epoch if need be.
    `local_world` training processes (None: all) share this machine's cores. `augment` augments each batch further on
    the CPU; workers then crop images of one size, too.

    Raises:
        UserError: No image can be read.
    """
    position = {"seed": seed, "rank": rank, "world": world, "accumulate": accumulate, "first_step": first_step}
    batches = ResumableBatchSampler(len(dataset), config.batch_size // (world * accumulate), **position)
    if batches.repeats > 1 and rank == 0:
        log.warning(
            f"the dataset has {pluralize(len(dataset), 'image')}, fewer than one step needs "
            f"(data.batch_size={config.batch_size}): each is used up to {batches.repeats} times per epoch"
        )
    in_memory = partial(InMemoryLoader, labels=dataset.labels, multicrop=multicrop, batch_sampler=batches)
    if isinstance(dataset, ArrayDataset) and not augment:
        return in_memory(place_on_device(dataset.all(channels), device), torch.arange(len(dataset)))
    read: Callable[..., Tensor] = partial(dataset.read, channels=channels)
    if budget := int(config.cache_gb * 1e9):
        cached = cache_in_memory(dataset, channels, budget=budget, skipped=skipped, show=rank == 0)
        if cached and not augment and (images := cached.stacked()) is not None:
            return in_memory(place_on_device(images, device), cached.readable)
        read = cached.read if cached else read
    crops = MultiCropDataset(
        read, dataset.labels, channels=channels, multicrop=multicrop, skipped=skipped, augment=augment
    )
    crops.first_readable(0, read)  # unreadable datasets fail here, not in a worker
    num_workers = resolve_num_workers(config.num_workers, processes=local_world or world)
    kwargs = _loader_kwargs(num_workers)
    return TrainingLoader(crops, **kwargs, batch_sampler=batches, persistent_workers=num_workers > 0)


class EvalBatch(NamedTuple):
    """Whole images, transformed for evaluation."""

    images: Tensor  # (B, C, S, S) uint8, without the unreadable ones
    indices: Tensor  # (B,) int64
    unreadable: list[UnreadableImageError]


@dataclass(eq=False)
class EvalDataset(Dataset[EvalBatch]):
    """Batches of transformed, not normalized images."""

    dataset: ImageDataset
    transform: EvalTransform
    channels: int

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


class EvalLoader:
    """All readable images in order, as pairs of a batch (B, C, S, S) uint8 and its indices (B,) int64.

    They are normalized later, on the device.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: EvalTransform,
        *,
        batch_size: int,
        num_workers: Workers,
        channels: int,
        skipped: SkippedImageLog,
    ) -> None:
        whole = EvalDataset(dataset, transform, channels)
        kwargs = _loader_kwargs(resolve_num_workers(num_workers, processes=1))
        self.batches: DataLoader[EvalBatch] = DataLoader(whole, **kwargs, batch_size=batch_size)
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        any_readable = False
        for images, indices, unreadable in self.batches:
            for error in unreadable:
                self.skipped.record(error)
            if len(indices):
                any_readable = True
                yield images, indices
        if not any_readable:
            raise UserError(f"none of the images can be read; {self.skipped.path} lists the reasons")


def _loader_kwargs(num_workers: int) -> dict[str, Any]:
    """Return the DataLoader arguments for datasets that return whole batches."""
    return {
        "num_workers": num_workers,
        "collate_fn": _identity,
        "worker_init_fn": _ignore_stop_signals,
        "pin_memory": torch.cuda.is_available(),
    }


def _ignore_stop_signals(worker: int) -> None:
    """Leave stop signals to the training process, with which the workers end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _identity(batch: T) -> T:
    return batch
