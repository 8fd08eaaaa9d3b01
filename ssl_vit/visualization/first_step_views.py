"""Views of the first training step: images, crop boxes, augmented views, and inputs and targets of a pretext task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from pydantic import ConfigDict, ValidationError
from torch import Tensor

from ssl_vit.config.methods import SelectedMethodConfig, ViewsConfig
from ssl_vit.config.pretrain import BackboneConfig, Source
from ssl_vit.config.types import Count, Seed, StrictConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.loading.batch_sampler import ResumableBatchSampler
from ssl_vit.data.loading.multicrop_dataset import MultiCropDataset
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.data.transforms.random_resized_crop import sample_crop_boxes
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import view_keys

Box = tuple[int, int, int, int]  # top, left, height and width in pixels
# Of normalized global views (B, G, C, S, S) and keys (B,): target and input (G·B, C, S, S), view by view, the hidden
# pixels (G·B, 1, S, S) and the quarter turns clockwise (G·B,); None if the method's input are the views.
Pretext = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor] | None]


class PretextSample(NamedTuple):
    """Input and target of the model for one view; images are in [0, 1]."""

    target: Tensor  # (C, S, S), the rotated view
    corrupted: Tensor  # (C, S, S), the input
    hidden: Tensor  # (S, S) bool: pixels replaced by noise or another image
    quarter: int  # quarter turns clockwise


class FirstStepViews(NamedTuple):
    """One image and all its views in a step."""

    name: str
    image: Tensor  # (C, H, W) uint8
    boxes: list[Box]  # of the views, in pixels of the image
    views: list[Tensor]  # (C, S, S) float in [0, 1], cropped and color-augmented; the global views first
    pretext: list[PretextSample]  # one per global view, if the method has a pretext task


def load_first_step(
    settings: RunSettings, dataset: ImageDataset, pretext: Pretext, *, count: int, skipped: SkippedImageLog
) -> list[FirstStepViews]:
    """Load the first images of the first training step with their views, which derive from the same keys.

    They equal those of training up to one level of 255, where training crops images of one size in a batch.

    Args:
        settings: Of the run.
        dataset: Training images.
        pretext: Of the method.
        count: Number of images, at most `data.batch_size`.
        skipped: Log of unreadable images, which are replaced by the next readable ones, as in training.

    Raises:
        UserError: No image can be read.
    """
    batch_size, seed = settings.data.batch_size, settings.seed
    sampler = ResumableBatchSampler(len(dataset), batch_size, seed=seed, rank=0, world=1, accumulate=1)
    views, channels = settings.method.views, settings.backbone.in_chans
    loader = MultiCropDataset(
        partial(dataset.read, channels=channels),
        dataset.labels,
        channels=channels,
        multicrop=MultiCrop(views),
        skipped=skipped,
    )
    batch = loader.__getitems__(next(iter(sampler))[: -(-count // 4) * 4])  # corruption exchanges blocks within fours
    if isinstance(batch, UserError):
        raise batch
    color = ColorAugmentation(views)
    global_views = color(batch.global_views, batch.key)  # (B, G, C, S, S)
    local_views = color(batch.local_views, batch.key, first_view=global_views.shape[1])  # (B, L, C, s, s)
    shown = [_denormalize(part, views) for part in (global_views, local_views)]
    samples = _pretext_samples(pretext(global_views, batch.key), views)
    found = []
    for row, index in enumerate(batch.index.tolist()[:count]):
        image = dataset.read(index, channels)
        boxes = crop_boxes(batch.key[row], (image.shape[1], image.shape[2]), views)
        own_views = [view for part in shown for view in part[row]]
        own_samples = samples[row :: len(batch.key)]  # view by view
        found.append(FirstStepViews(dataset.name(index), image, boxes, own_views, own_samples))
    return found


def crop_boxes(key: Tensor, size: tuple[int, int], views: ViewsConfig) -> list[Box]:
    """Return the crop boxes of all views of the sample with a key () in an image of this height and width."""
    boxes: list[Box] = []
    for crops, first in ((views.global_crops, 0), (views.local_crops, views.global_crops.count)):
        sampled = sample_crop_boxes(view_keys(key, first, crops.count), *size, crops=crops, flip=views.flip)
        boxes += zip(*(part.tolist() for part in sampled[:4]), strict=True)
    return boxes


def _pretext_samples(pretext: tuple[Tensor, Tensor, Tensor, Tensor] | None, views: ViewsConfig) -> list[PretextSample]:
    if pretext is None:
        return []
    target, corrupted, mask, quarter = pretext
    parts = _denormalize(target, views), _denormalize(corrupted, views), mask[:, 0], quarter.tolist()
    return [PretextSample(*sample) for sample in zip(*parts, strict=True)]


def _denormalize(x: Tensor, views: ViewsConfig) -> Tensor:
    """Return normalized images (..., C, H, W) in [0, 1]."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (views.mean, views.std))
    return (x * std + mean).clamp(0, 1)


class RunDataConfig(StrictConfig):
    """Keys of the section `data`; others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    source: Source
    root: Path
    batch_size: Count


class RunSettings(StrictConfig):
    """Keys of the configuration of a pretraining run of any version; others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seed: Seed
    data: RunDataConfig
    backbone: BackboneConfig
    method: SelectedMethodConfig


def read_run_settings(run: Path) -> RunSettings:
    """Read the settings from `config.yaml` of a run directory.

    Raises:
        UserError: There is no configuration of a pretraining run, it is of version 0.1, or it is damaged.
    """
    path, values = run / "config.yaml", None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return RunSettings.model_validate(values)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a run directory") from None
    except (ValidationError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
        trainer = values.get("trainer") if isinstance(values, dict) else None
        if isinstance(trainer, dict) and "accumulate" in trainer:  # today accumulate_grad_batches
            raise UserError(f"{run} is a run of ssl-vit 0.1, whose settings this version cannot read") from None
        raise UserError(f"{path} is damaged, or not of a pretraining run") from None
