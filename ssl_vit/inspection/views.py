"""What a run saw first: pictures of its first step, their views, and for SiT what becomes of them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.config import SiTConfig, ViewsConfig
from ssl_vit.data.datasets import CroppedPictures
from ssl_vit.data.pictures import Pictures, SkippedPictures
from ssl_vit.data.sampler import EpochBatches
from ssl_vit.errors import UserError
from ssl_vit.inspection.settings import RunSettings
from ssl_vit.transforms.boxes import draw_boxes
from ssl_vit.transforms.corruption import Corruption, corrupt_views, quarter_turns, rotate
from ssl_vit.transforms.crops import MultiCrop
from ssl_vit.transforms.photometric import Photometric
from ssl_vit.transforms.randomness import view_keys

Box = tuple[int, int, int, int]  # top, left, height and width in pixels


class Puzzle(NamedTuple):
    """What SiT's network gets of a view, and what it has to make of it; pictures are in [0, 1]."""

    quarter: int  # quarter turns clockwise
    target: Tensor  # (C, S, S), the turned view
    given: Tensor  # (C, S, S), the target corrupted
    hidden: Tensor  # (S, S) bool: where noise or another picture stands


class Seen(NamedTuple):
    """One picture and all views of it in a step."""

    name: str
    picture: Tensor  # (C, H, W) uint8
    boxes: list[Box]  # of the views, in the picture's own pixels
    views: list[Tensor]  # (C, S, S) float in [0, 1], as cut out and with their colours changed; the global ones first
    puzzles: list[Puzzle]  # of SiT, one per view


def first_seen(settings: RunSettings, pictures: Pictures, *, count: int, skipped: SkippedPictures) -> list[Seen]:
    """The first pictures of a run's first step, with the keys that they had there.

    To a level of 255 as in training, where pictures of one size may be cut by another routine.

    Args:
        settings: Of the run.
        pictures: That it learns from.
        count: How many to show; a step holds no more than `data.batch_size`.
        skipped: Takes the broken pictures; in their places stand the next good ones, as in training.

    Raises:
        UserError: No picture can be read.
    """
    step = next(
        iter(EpochBatches(len(pictures), settings.data.batch_size, seed=settings.seed, rank=0, world=1, accumulate=1))
    )
    views, channels = settings.method.views, settings.backbone.in_chans
    loader = CroppedPictures(
        partial(pictures.read, channels=channels),
        pictures.labels,
        channels=channels,
        multicrop=MultiCrop(views),
        skipped=skipped,
    )
    batch = loader.__getitems__(step[: -(-count // 4) * 4])  # pictures lend each other blocks in fours
    if isinstance(batch, UserError):
        raise batch
    photometric = Photometric(views)
    global_views = photometric(batch.global_views, batch.key)  # (B, G, C, S, S)
    local_views = photometric(batch.local_views, batch.key, first_view=global_views.shape[1])  # (B, L, C, s, s)
    shown = [_in_colour(kind, views) for kind in (global_views, local_views)]
    puzzles = _puzzles(global_views, batch.key, settings.method) if isinstance(settings.method, SiTConfig) else []
    seen = []
    for place, index in enumerate(batch.index.tolist()[:count]):
        picture = pictures.read(index, channels)
        boxes = boxes_of(batch.key[place], (picture.shape[1], picture.shape[2]), views)
        of_picture = [view for kind in shown for view in kind[place]]
        seen.append(Seen(pictures.name(index), picture, boxes, of_picture, puzzles[place] if puzzles else []))
    return seen


def boxes_of(key: Tensor, size: tuple[int, int], views: ViewsConfig) -> list[Box]:
    """Where the views of the sample with a key () are cut out of a picture of this height and width."""
    boxes: list[Box] = []
    for crops, first in ((views.global_crops, 0), (views.local_crops, views.global_crops.count)):
        drawn = draw_boxes(view_keys(key, first, crops.count), *size, crops=crops, flip=views.flip)
        boxes += zip(*(part.tolist() for part in drawn[:4]), strict=True)
    return boxes


def _puzzles(global_views: Tensor, key: Tensor, config: SiTConfig) -> list[list[Puzzle]]:
    """For each picture what SiT makes of its two views (B, 2, C, S, S), normalised."""
    quarter = quarter_turns(key).T.flatten() * config.rotation.enabled  # (2B,)
    target = rotate(global_views.transpose(0, 1).flatten(0, 1), quarter)  # (2B, C, S, S)
    given, mask = corrupt_views(Corruption(config.corruption), target, key)
    parts = zip(
        quarter.tolist(), _in_colour(target, config.views), _in_colour(given, config.views), mask[:, 0], strict=True
    )
    puzzles = [Puzzle(*part) for part in parts]
    return [list(pair) for pair in zip(puzzles[: len(key)], puzzles[len(key) :], strict=True)]


def _in_colour(x: Tensor, views: ViewsConfig) -> Tensor:
    """Normalised pictures (..., C, H, W) back in [0, 1]."""
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (views.mean, views.std))
    return (x * std + mean).clamp(0, 1)
