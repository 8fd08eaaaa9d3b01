"""What a run saw first: images of its first step, their views, and for SiT what becomes of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from pydantic import ConfigDict, ValidationError
from torch import Tensor

from ssl_vit.config.methods import MethodConfig, SiTConfig, ViewsConfig
from ssl_vit.config.pretrain import BackboneConfig, Source
from ssl_vit.config.types import Count, Seed, StrictConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.loading.batch_sampler import ResumableBatchSampler
from ssl_vit.data.loading.multicrop_dataset import MultiCropDataset
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.corruption import Corruption, corrupt_views, rotate, sample_rotations
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.data.transforms.random_resized_crop import sample_crop_boxes
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import view_keys

Box = tuple[int, int, int, int]  # top, left, height and width in pixels


class SiTSample(NamedTuple):
    """What SiT's model gets of a view, and what it has to make of it; images are in [0, 1]."""

    quarter: int  # quarter turns clockwise
    target: Tensor  # (C, S, S), the turned view
    given: Tensor  # (C, S, S), the target corrupted
    hidden: Tensor  # (S, S) bool: where noise or another image stands


class FirstStepViews(NamedTuple):
    """One image and all views of it in a step."""

    name: str
    image: Tensor  # (C, H, W) uint8
    boxes: list[Box]  # of the views, in the image's own pixels
    views: list[Tensor]  # (C, S, S) float in [0, 1], as cut out and with their colors changed; the global ones first
    puzzles: list[SiTSample]  # of SiT, one per view


def load_first_step(
    settings: RunSettings, dataset: ImageDataset, *, count: int, skipped: SkippedImageLog
) -> list[FirstStepViews]:
    """The first images of a run's first step, with the keys that they had there.

    To a level of 255 as in training, where images of one size may be cut by another routine.

    Args:
        settings: Of the run.
        dataset: That it learns from.
        count: How many to show; a step holds no more than `data.batch_size`.
        skipped: Takes the broken images; in their places stand the next good ones, as in training.

    Raises:
        UserError: No image can be read.
    """
    step = next(
        iter(
            ResumableBatchSampler(
                len(dataset), settings.data.batch_size, seed=settings.seed, rank=0, world=1, accumulate=1
            )
        )
    )
    views, channels = settings.method.views, settings.backbone.in_chans
    loader = MultiCropDataset(
        partial(dataset.read, channels=channels),
        dataset.labels,
        channels=channels,
        multicrop=MultiCrop(views),
        skipped=skipped,
    )
    batch = loader.__getitems__(step[: -(-count // 4) * 4])  # images lend each other blocks in fours
    if isinstance(batch, UserError):
        raise batch
    photometric = ColorAugmentation(views)
    global_views = photometric(batch.global_views, batch.key)  # (B, G, C, S, S)
    local_views = photometric(batch.local_views, batch.key, first_view=global_views.shape[1])  # (B, L, C, s, s)
    shown = [_in_color(kind, views) for kind in (global_views, local_views)]
    puzzles = _puzzles(global_views, batch.key, settings.method) if isinstance(settings.method, SiTConfig) else []
    seen = []
    for place, index in enumerate(batch.index.tolist()[:count]):
        image = dataset.read(index, channels)
        boxes = boxes_of(batch.key[place], (image.shape[1], image.shape[2]), views)
        of_image = [view for kind in shown for view in kind[place]]
        seen.append(FirstStepViews(dataset.name(index), image, boxes, of_image, puzzles[place] if puzzles else []))
    return seen


def boxes_of(key: Tensor, size: tuple[int, int], views: ViewsConfig) -> list[Box]:
    """Where the views of the sample with a key () are cut out of an image of this height and width."""
    boxes: list[Box] = []
    for crops, first in ((views.global_crops, 0), (views.local_crops, views.global_crops.count)):
        drawn = sample_crop_boxes(view_keys(key, first, crops.count), *size, crops=crops, flip=views.flip)
        boxes += zip(*(part.tolist() for part in drawn[:4]), strict=True)
    return boxes


def _puzzles(global_views: Tensor, key: Tensor, config: SiTConfig) -> list[list[SiTSample]]:
    """For each image what SiT makes of its two views (B, 2, C, S, S), normalized."""
    quarter = sample_rotations(key).T.flatten() * config.rotation.enabled  # (2B,)
    target = rotate(global_views.transpose(0, 1).flatten(0, 1), quarter)  # (2B, C, S, S)
    given, mask = corrupt_views(Corruption(config.corruption), target, key)
    parts = zip(
        quarter.tolist(), _in_color(target, config.views), _in_color(given, config.views), mask[:, 0], strict=True
    )
    puzzles = [SiTSample(*part) for part in parts]
    return [list(pair) for pair in zip(puzzles[: len(key)], puzzles[len(key) :], strict=True)]


def _in_color(x: Tensor, views: ViewsConfig) -> Tensor:
    """Normalized images (..., C, H, W) back in [0, 1]."""
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (views.mean, views.std))
    return (x * std + mean).clamp(0, 1)


class SeenData(StrictConfig):
    """Of the section `data`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    source: Source
    root: Path
    batch_size: Count


class RunSettings(StrictConfig):
    """Of a pretraining run, by any version of this package: keys that are not named here may be there or not."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seed: Seed
    data: SeenData
    backbone: BackboneConfig
    method: MethodConfig


def run_settings(run: Path) -> RunSettings:
    """Of the run in a folder.

    Raises:
        UserError: There is no `config.yaml` of a pretraining run in it, or it is damaged.
    """
    path = run / "config.yaml"
    try:
        return RunSettings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run") from None
    except (ValidationError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
        raise UserError(f"{path} is damaged, or not of a pretraining run") from None
