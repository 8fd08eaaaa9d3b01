"""Backbone outputs for images of any size: read one by one, batched by equal size, in constant memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, UnreadableImageError
from ssl_vit.models.attention_maps import LastBlockFeatures, extract_last_block, resize_to_patch_multiple
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError

BATCH_PIXELS = 2**20  # of resized images in one forward pass
WAITING_PIXELS = 2**25  # of images at their own size that wait for others of their resized size

Waiting = tuple[int, Tensor, Tensor]  # index of an image, its pixels (C, H, W) and resized pixels (C, h, w) uint8


class ImageOutputs(NamedTuple):
    """One image and the features of each model."""

    image_index: int  # in the dataset
    image: Tensor  # (C, H, W) uint8, at its own size
    features: list[LastBlockFeatures]  # one per model


def run_backbone(
    dataset: ImageDataset,
    indices: Iterable[int],
    *,
    models: list[LoadedBackbone],
    max_side: int | None,
    skipped: SkippedImageLog,
) -> Iterator[ImageOutputs]:
    """Yield the outputs of models of one architecture for every readable image, in the order in which batches fill up.

    Images may have any size and aspect; larger ones than `max_side` pixels are reduced to it for the models.
    """
    config = models[0].backbone.config
    waiting: dict[torch.Size, list[Waiting]] = defaultdict(list)
    for index in indices:
        try:
            image = dataset.read(index, config.in_chans)
            resized = resize_to_patch_multiple(image, config.patch_size, max_side)
        except UnreadableImageError as error:
            skipped.record(error)
            continue
        except UserError as too_small:
            skipped.record(UnreadableImageError(dataset.name(index), str(too_small)))
            continue
        same_size = waiting[resized.shape]
        same_size.append((index, image, resized))
        if len(same_size) * resized[0].numel() >= BATCH_PIXELS:
            yield from _run_batch(waiting.pop(resized.shape), models)
        while sum(image[0].numel() for group in waiting.values() for _, image, _ in group) > WAITING_PIXELS:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]) * shape.numel())
            yield from _run_batch(waiting.pop(fullest), models)
    for batch in waiting.values():
        yield from _run_batch(batch, models)


def _run_batch(batch: list[Waiting], models: list[LoadedBackbone]) -> Iterator[ImageOutputs]:
    pixels = torch.stack([resized for *_, resized in batch]).to(models[0].backbone.device).float() / 255  # (B, C, h, w)
    outputs = [extract_last_block(model.backbone, normalize(pixels, model)) for model in models]
    for (index, image, _), *features in zip(batch, *outputs, strict=True):
        yield ImageOutputs(index, image, features)


def normalize(pixels: Tensor, model: LoadedBackbone) -> Tensor:
    """Normalize pixels (B, C, H, W) in [0, 1] as in the model's training."""
    mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (model.mean, model.std))
    return (pixels - mean) / std
