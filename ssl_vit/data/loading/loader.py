"""Data loaders for training (views) and evaluation (whole images)."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_vit.config.pretrain import PretrainDataConfig, Workers
from ssl_vit.data.batch import Batch
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.loading.batch_sampler import ResumableBatchSampler
from ssl_vit.data.loading.multicrop_dataset import EvalBatch, EvalDataset, MultiCropDataset
from ssl_vit.data.loading.ram_cache import cache_in_memory, place_on_device
from ssl_vit.data.sources.torchvision_datasets import ArrayDataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import STOP_SIGNALS
from ssl_vit.runtime.text import pluralize
from ssl_vit.runtime.workers import resolve_num_workers

T = TypeVar("T")

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)


class InMemoryLoader:
    """Batches of crops from in-memory images of one size, on the device of the images, without the CPU waiting for it.

    Labels, indices and keys stay on the CPU.

    Args:
        images: The readable images (M, C, H, W) uint8, on the CPU or a GPU.
        readable: Their indices (M,), ascending; an unreadable image is replaced by the next readable one.
        labels: Of all images (N,).
        multicrop: Makes the views.
        batch_sampler: Chooses the images.
    """

    def __init__(
        self,
        images: Tensor,
        readable: Tensor,
        labels: Tensor,
        *,
        multicrop: MultiCrop,
        batch_sampler: ResumableBatchSampler,
    ) -> None:
        self.images = images
        self.readable = readable
        self.labels = labels
        self.multicrop = multicrop
        self.batch_sampler = batch_sampler

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

    Images of one size that fit into memory are placed on the device and cropped there; others that fit are kept decoded
    and cropped by workers; the rest is read from disk by workers. The crops are the same in each case (to a pixel for
    JPEGs decoded at reduced size), and an unreadable image is replaced by the next readable one.

    Args:
        dataset: The training images.
        multicrop: Makes the views.
        config: Batch size over all processes, workers, cache size.
        seed: The seed of the run.
        channels: 1 or 3.
        rank: Rank of this process.
        world: Number of training processes.
        accumulate: Micro-batches per optimizer step.
        first_step: Optimizer steps already done; the batches continue after them, within an epoch if need be.
        skipped: Logs unreadable images.
        local_world: Training processes on this machine, which share its cores; None: all.
        device: The training device; images of one size are placed there if they take at most half of its memory.
        augment: Further augmentation of each batch on the CPU; workers then crop images of one size, too.

    Raises:
        UserError: No image can be read.
    """
    position = {"seed": seed, "rank": rank, "world": world, "accumulate": accumulate, "first_step": first_step}
    batches = ResumableBatchSampler(len(dataset), config.batch_size // (world * accumulate), **position)
    if batches.repeats > 1 and rank == 0:
        log.warning(_repeat_warning(len(dataset), config.batch_size, batches.repeats))
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


def _repeat_warning(count: int, batch_size: int, repeats: int) -> str:
    return (
        f"the dataset has {pluralize(count, 'image')}, fewer than one step needs (data.batch_size={batch_size}): "
        f"each is used up to {repeats} times per epoch"
    )


class EvalLoader:
    """All readable images in order, as pairs of a batch (B, C, S, S) uint8 and its indices (B,) int64."""

    def __init__(self, batches: DataLoader[EvalBatch], skipped: SkippedImageLog) -> None:
        self.batches = batches
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


def build_eval_loader(
    dataset: ImageDataset,
    transform: EvalTransform,
    *,
    batch_size: int,
    num_workers: Workers,
    channels: int,
    skipped: SkippedImageLog,
) -> EvalLoader:
    """Build the loader of whole images for evaluation.

    Args:
        dataset: The images.
        transform: Brings them to one size; they are normalized later, on the device.
        batch_size: Images per batch, unreadable ones included.
        num_workers: Worker processes.
        channels: 1 or 3.
        skipped: Logs unreadable images.
    """
    whole = EvalDataset(dataset, transform, channels=channels)
    kwargs = _loader_kwargs(resolve_num_workers(num_workers, processes=1))
    return EvalLoader(DataLoader(whole, **kwargs, batch_size=batch_size), skipped)


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
