"""From pictures to batches: views for training, whole pictures for evaluation."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_vit.config import PretrainDataConfig, Workers
from ssl_vit.data.arrays import ArrayPictures
from ssl_vit.data.datasets import CroppedPictures, WholeBatch, WholePictures
from ssl_vit.data.memory import decode_all, home
from ssl_vit.data.parallel import loading_workers
from ssl_vit.data.pictures import Pictures, SkippedPictures
from ssl_vit.data.sampler import EpochBatches
from ssl_vit.errors import UserError
from ssl_vit.processes import STOP_SIGNALS
from ssl_vit.transforms.batch import Batch
from ssl_vit.transforms.crops import MultiCrop
from ssl_vit.transforms.evaluation import EvalTransform
from ssl_vit.transforms.transfer import sent

T = TypeVar("T")

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)


class ResidentLoader:
    """Batches from pictures of one size in memory, cropped where they lie, without the CPU waiting for a GPU.

    Labels, indices and keys stay on the CPU.

    Args:
        images: The readable pictures (M, C, H, W) uint8, on the CPU or a GPU.
        good: Their indices (M,), ascending; a picture that is missing here is replaced by the next one.
        labels: Of all pictures (N,).
        multicrop: Makes the views.
        batch_sampler: Chooses the pictures.
    """

    def __init__(
        self, images: Tensor, good: Tensor, labels: Tensor, *, multicrop: MultiCrop, batch_sampler: EpochBatches
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
            pictures = self.images.index_select(0, sent(row, self.images.device))
            global_views, local_views = self.multicrop.batch(pictures, key)
            index = self.good[row]
            yield Batch(global_views, local_views, self.labels[index], index, key)


class TrainingLoader(DataLoader[Batch | UserError]):
    """Batches from CroppedPictures; what a loading process has to say to the user arrives without its traceback."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # torch promises its own iterator
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def training_loader(
    pictures: Pictures,
    multicrop: MultiCrop,
    config: PretrainDataConfig,
    *,
    seed: int,
    channels: int,
    rank: int,
    world: int,
    accumulate: int,
    first_step: int,
    skipped: SkippedPictures,
    local_world: int | None = None,
    device: torch.device = _CPU,
    augment: Callable[[Batch], Batch] | None = None,
) -> ResidentLoader | TrainingLoader:
    """The batches of training process `rank` of `world`; each iteration is one epoch.

    Pictures of one size that fit into memory lie on the device and are cropped there. Of different sizes, they are kept
    decoded, and loading processes crop them. All others are read from disk by loading processes. Either way the same
    boxes are cut from the same pictures (to a pixel from JPEGs that are decoded smaller than they are), and a broken
    picture is replaced by the next good one.

    Args:
        pictures: To be learned from.
        multicrop: Makes the views.
        config: Batch size over all processes, workers, memory.
        seed: Of the run.
        channels: 1 or 3.
        rank: This process.
        world: Training processes.
        accumulate: Micro-batches per optimizer step.
        first_step: Optimizer steps already done; the batches go on behind them, within an epoch if need be.
        skipped: Takes the broken pictures.
        local_world: Of them on this machine, which share its cores; None: all.
        device: That trains; pictures of one size lie and are cropped there, if half of its memory holds them.
        augment: What is done to each batch besides, on the CPU; then loading processes crop pictures of one size, too.

    Raises:
        UserError: No picture can be read.
    """
    course = {"seed": seed, "rank": rank, "world": world, "accumulate": accumulate, "first_step": first_step}
    batches = EpochBatches(len(pictures), config.batch_size // (world * accumulate), **course)
    if batches.repeats > 1 and rank == 0:
        log.warning(_repeating(len(pictures), config.batch_size, batches.repeats))
    resident = partial(ResidentLoader, labels=pictures.labels, multicrop=multicrop, batch_sampler=batches)
    if isinstance(pictures, ArrayPictures) and not augment:
        return resident(home(pictures.all(channels), device), torch.arange(len(pictures)))
    read: Callable[..., Tensor] = partial(pictures.read, channels=channels)
    if budget := int(config.memory_gb * 1e9):
        kept = decode_all(pictures, channels, budget=budget, skipped=skipped, show=rank == 0)
        if kept and not augment and (images := kept.as_one()) is not None:
            return resident(home(images, device), kept.good)
        read = kept.read if kept else read
    crops = CroppedPictures(
        read, pictures.labels, channels=channels, multicrop=multicrop, skipped=skipped, augment=augment
    )
    crops.first_readable(0, read)  # so that unreadable data sets fail here, not in a loading process
    workers = loading_workers(config.workers, processes=local_world or world)
    return TrainingLoader(crops, **_how(workers), batch_sampler=batches, persistent_workers=workers > 0)


def _repeating(pictures: int, batch_size: int, times: int) -> str:
    return (
        f"{pictures} pictures are fewer than one step holds (data.batch_size={batch_size}): each is seen up to {times} "
        "times per epoch"
    )


class EvalLoader:
    """All readable pictures in their order, as pairs of a batch (B, C, S, S) uint8 and its indices (B,) int64."""

    def __init__(self, batches: DataLoader[WholeBatch], skipped: SkippedPictures) -> None:
        self.batches = batches
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        any_readable = False
        for pictures, indices, broken in self.batches:
            for picture in broken:
                self.skipped.record(picture)
            if len(indices):
                any_readable = True
                yield pictures, indices
        if not any_readable:
            raise UserError(f"none of the pictures can be read; {self.skipped.path} says why")


def eval_loader(
    pictures: Pictures,
    transform: EvalTransform,
    *,
    batch_size: int,
    workers: Workers,
    channels: int,
    skipped: SkippedPictures,
) -> EvalLoader:
    """Whole pictures for evaluation.

    Args:
        pictures: To be evaluated on.
        transform: Makes them one size; normalising is left to the device.
        batch_size: Pictures per batch; broken ones are missing from theirs.
        workers: Loading processes.
        channels: 1 or 3.
        skipped: Takes the broken pictures.
    """
    whole = WholePictures(pictures, transform, channels=channels)
    how = _how(loading_workers(workers, processes=1))
    return EvalLoader(DataLoader(whole, **how, batch_size=batch_size), skipped)


def _how(workers: int) -> dict[str, Any]:
    """A DataLoader's settings for batches that come from the dataset as they are."""
    return {
        "num_workers": workers,
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
