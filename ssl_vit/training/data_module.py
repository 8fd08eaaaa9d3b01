"""Training batches: a LightningDataModule for pretraining in anyone's Trainer, and labeled images with RandAugment."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import Dataset

from ssl_vit.config.evaluate import EvalDataConfig, RandAugmentConfig
from ssl_vit.config.methods import ViewsConfig
from ssl_vit.config.pretrain import PretrainDataConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.loading.loader import TrainingLoader, build_train_loader
from ssl_vit.data.loading.ram_cache import InMemoryLoader
from ssl_vit.data.sources.torch_dataset import TorchDataset
from ssl_vit.data.transforms.mixup import RandAugment
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.methods.schedules import TrainingPlan


class ImageDataModule(L.LightningDataModule):
    """Multi-crop batches for DINO, SiT and every other method, in anyone's `lightning.Trainer`.

    Processes, micro-batches and the device are those of the trainer; `data.batch_size` is the global batch. With
    several processes give the trainer `use_distributed_sampler=False`: the batches are divided here.

    Args:
        data: Section `data` of a pretrain configuration.
        views: Section `method.views`.
        seed: Seed of the order of the images and of their crops.
        dataset: Own images instead of those of `data.root`: a map-style dataset of images or (image, label) pairs.
        skipped: File that lists images that cannot be read; default: one in the system's temporary folder.

    Raises:
        UserError: There are no images.
    """

    def __init__(
        self,
        data: PretrainDataConfig,
        views: ViewsConfig,
        *,
        seed: int = 0,
        dataset: Dataset[Any] | None = None,
        skipped: Path | None = None,
    ) -> None:
        super().__init__()
        self.data, self.views, self.seed = data, views, seed
        self.dataset = build_dataset(data.source, data.root) if dataset is None else TorchDataset(dataset)
        self.dataset.with_range(data.range)
        self.skipped = SkippedImageLog(skipped or Path(tempfile.mkdtemp(prefix="ssl-vit-")) / "skipped_images.txt")

    def plan(self, *, max_epochs: int, log_every_n_steps: int = 50) -> TrainingPlan:
        """Return the plan that a method needs for its schedules: the length of a run of `max_epochs`."""
        steps_per_epoch = max(1, len(self.dataset) // self.data.batch_size)
        return TrainingPlan(
            max_epochs * steps_per_epoch, steps_per_epoch, self.data.batch_size, log_every_n_steps, self.seed
        )

    def train_dataloader(self) -> InMemoryLoader | TrainingLoader:
        """Build the loader of this process; each iteration is one epoch."""
        assert self.trainer is not None
        return build_train_loader(
            self.dataset,
            MultiCrop(self.views),
            self.data,
            seed=self.seed,
            channels=len(self.views.mean),
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            accumulate=self.trainer.accumulate_grad_batches,
            first_step=self.trainer.global_step,
            skipped=self.skipped,
            device=self.trainer.strategy.root_device,
        )


def labeled_train_loader(
    dataset: ImageDataset,
    views: ViewsConfig,
    data: EvalDataConfig,
    rand_augment: RandAugmentConfig,
    *,
    seed: int,
    channels: int,
    cache_gb: float,
) -> partial[InMemoryLoader | TrainingLoader]:
    """Return the loader factory of supervised training: one crop of each image, then RandAugment if it has layers."""
    return partial(
        build_train_loader,
        dataset,
        MultiCrop(views),
        PretrainDataConfig(
            source=data.source,
            root=data.root or data.train or Path(),
            range=dataset.value_range,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            cache_gb=cache_gb,
        ),
        seed=seed,
        channels=channels,
        augment=RandAugment(rand_augment, size=views.global_crops.size, mean=views.mean)
        if rand_augment.layers
        else None,
    )
