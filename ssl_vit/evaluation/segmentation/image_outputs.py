"""Images of any size through one or more models: read one by one, batched by equal size, in constant memory."""

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

BATCH_PIXELS = 2**20  # of fitted images in one forward pass
WAITING_PIXELS = 2**25  # of images at their own size that wait for others of their fitted size


class ImageOutputs(NamedTuple):
    """One image and what each model sees in it."""

    place: int  # among the images
    image: Tensor  # (C, H, W) uint8, at its own size
    sights: list[LastBlockFeatures]  # one per model


class _Waiting(NamedTuple):
    place: int
    image: Tensor  # (C, H, W) uint8
    fitted: Tensor  # (C, h, w) uint8


def run_backbone(
    dataset: ImageDataset,
    indices: Iterable[int],
    *,
    models: list[LoadedBackbone],
    max_side: int | None,
    skipped: SkippedImageLog,
) -> Iterator[ImageOutputs]:
    """What models see in every image that can be read, in the order in which batches fill up.

    Args:
        dataset: Of any size and aspect.
        indices: Which of them.
        models: Of one architecture.
        max_side: Larger images are reduced to this many pixels for the models; None: never.
        skipped: Receives every image that is left out, with the reason.
    """
    config = models[0].backbone.config
    waiting: dict[torch.Size, list[_Waiting]] = defaultdict(list)
    for index in indices:
        try:
            image = dataset.read(index, config.in_chans)
            fitted = resize_to_patch_multiple(image, config.patch_size, max_side)
        except UnreadableImageError as broken:
            skipped.record(broken)
            continue
        except UserError as too_small:
            skipped.record(UnreadableImageError(dataset.name(index), str(too_small)))
            continue
        same = waiting[fitted.shape]
        same.append(_Waiting(index, image, fitted))
        if len(same) * fitted[0].numel() >= BATCH_PIXELS:
            yield from _attend_batch(waiting.pop(fitted.shape), models)
        while sum(item.image[0].numel() for group in waiting.values() for item in group) > WAITING_PIXELS:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]) * shape.numel())
            yield from _attend_batch(waiting.pop(fullest), models)
    for batch in waiting.values():
        yield from _attend_batch(batch, models)


def _attend_batch(batch: list[_Waiting], models: list[LoadedBackbone]) -> Iterator[ImageOutputs]:
    device = models[0].backbone.device
    pixels = torch.stack([item.fitted for item in batch]).to(device).float() / 255  # (B, C, h, w)
    sights = [extract_last_block(model.backbone, normalize(pixels, model)) for model in models]
    for item, *of_image in zip(batch, *sights, strict=True):
        yield ImageOutputs(item.place, item.image, of_image)


def normalize(pixels: Tensor, model: LoadedBackbone) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1] as the model was trained to see them."""
    mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (model.mean, model.std))
    return (pixels - mean) / std
