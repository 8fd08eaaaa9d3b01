"""From images to batches: views for training, whole images for evaluation."""

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
from ssl_vit.runtime.workers import resolve_num_workers

T = TypeVar("T")

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)


class InMemoryLoader:
    """Batches from images of one size in memory, cropped where they lie, without the CPU waiting for a GPU.

    Labels, indices and keys stay on the CPU.

    Args:
        images: The readable images (M, C, H, W) uint8, on the CPU or a GPU.
        good: Their indices (M,), ascending; an image that is missing here is replaced by the next one.
        labels: Of all images (N,).
        multicrop: Makes the views.
        batch_sampler: Chooses the images.
    """

    def __init__(
        self,
        images: Tensor,
        good: Tensor,
        labels: Tensor,
        *,
        multicrop: MultiCrop,
        batch_sampler: ResumableBatchSampler,
    ) -> None:
        self.images = images
        self.good = good
        self.labels = labels
        self.multicrop = multicrop
        self.batch_sampler = batch_sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        for picks in self.batch_sampler:
            wanted, key = torch.tensor(picks).T.contiguous().unbind(0)  # (B,) each
            row = torch.searchsorted(self.good, wanted) % len(self.good)
            dataset = self.images.index_select(0, to_device_async(row, self.images.device))
            global_views, local_views = self.multicrop.batch(dataset, key)
            index = self.good[row]
            yield Batch(global_views, local_views, self.labels[index], index, key)


class TrainingLoader(DataLoader[Batch | UserError]):
    """Batches from MultiCropDataset; what a loading process has to say to the user arrives without its traceback."""

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
    """The batches of training process `rank` of `world`; each iteration is one epoch.

    Images of one size that fit into memory lie on the device and are cropped there. Of different sizes, they are kept
    decoded, and loading processes crop them. All others are read from disk by loading processes. Either way the same
    boxes are cut from the same images (to a pixel from JPEGs that are decoded smaller than they are), and a broken
    image is replaced by the next good one.

    Args:
        dataset: To be learned from.
        multicrop: Makes the views.
        config: Batch size over all processes, num_workers, memory.
        seed: Of the run.
        channels: 1 or 3.
        rank: This process.
        world: Training processes.
        accumulate: Micro-batches per optimizer step.
        first_step: Optimizer steps already done; the batches go on behind them, within an epoch if need be.
        skipped: Takes the broken images.
        local_world: Of them on this machine, which share its cores; None: all.
        device: That trains; images of one size lie and are cropped there, if half of its memory holds them.
        augment: What is done to each batch besides, on the CPU; then loading processes crop images of one size, too.

    Raises:
        UserError: No image can be read.
    """
    course = {"seed": seed, "rank": rank, "world": world, "accumulate": accumulate, "first_step": first_step}
    batches = ResumableBatchSampler(len(dataset), config.batch_size // (world * accumulate), **course)
    if batches.repeats > 1 and rank == 0:
        log.warning(_repeating(len(dataset), config.batch_size, batches.repeats))
    resident = partial(InMemoryLoader, labels=dataset.labels, multicrop=multicrop, batch_sampler=batches)
    if isinstance(dataset, ArrayDataset) and not augment:
        return resident(place_on_device(dataset.all(channels), device), torch.arange(len(dataset)))
    read: Callable[..., Tensor] = partial(dataset.read, channels=channels)
    if budget := int(config.cache_gb * 1e9):
        kept = cache_in_memory(dataset, channels, budget=budget, skipped=skipped, show=rank == 0)
        if kept and not augment and (images := kept.as_one()) is not None:
            return resident(place_on_device(images, device), kept.good)
        read = kept.read if kept else read
    crops = MultiCropDataset(
        read, dataset.labels, channels=channels, multicrop=multicrop, skipped=skipped, augment=augment
    )
    crops.first_readable(0, read)  # so that unreadable data sets fail here, not in a loading process
    num_workers = resolve_num_workers(config.num_workers, processes=local_world or world)
    return TrainingLoader(crops, **_how(num_workers), batch_sampler=batches, persistent_workers=num_workers > 0)


def _repeating(dataset: int, batch_size: int, times: int) -> str:
    return (
        f"{dataset} images are fewer than one step holds (data.batch_size={batch_size}): each is seen up to {times} "
        "times per epoch"
    )


class EvalLoader:
    """All readable images in their order, as pairs of a batch (B, C, S, S) uint8 and its indices (B,) int64."""

    def __init__(self, batches: DataLoader[EvalBatch], skipped: SkippedImageLog) -> None:
        self.batches = batches
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        any_readable = False
        for dataset, indices, broken in self.batches:
            for image in broken:
                self.skipped.record(image)
            if len(indices):
                any_readable = True
                yield dataset, indices
        if not any_readable:
            raise UserError(f"none of the images can be read; {self.skipped.path} says why")


def build_eval_loader(
    dataset: ImageDataset,
    transform: EvalTransform,
    *,
    batch_size: int,
    num_workers: Workers,
    channels: int,
    skipped: SkippedImageLog,
) -> EvalLoader:
    """Whole images for evaluation.

    Args:
        dataset: To be evaluated on.
        transform: Makes them one size; normalizing is left to the device.
        batch_size: Images per batch; broken ones are missing from theirs.
        num_workers: Loading processes.
        channels: 1 or 3.
        skipped: Takes the broken images.
    """
    whole = EvalDataset(dataset, transform, channels=channels)
    how = _how(resolve_num_workers(num_workers, processes=1))
    return EvalLoader(DataLoader(whole, **how, batch_size=batch_size), skipped)


def _how(num_workers: int) -> dict[str, Any]:
    """A DataLoader's settings for batches that come from the dataset as they are."""
    return {
        "num_workers": num_workers,
        "collate_fn": _as_it_is,
        "worker_init_fn": _leave_signals_alone,
        "pin_memory": torch.cuda.is_available(),
    }


def _leave_signals_alone(worker: int) -> None:
    """Loading processes end with the training process: a signal to the whole group is for that one to answer."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: T) -> T:
    return batch
