"""Pictures of any size through one or more networks: read one by one, batched by equal size, in constant memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.attention.maps import Sight, fit_to_patches, look
from ssl_vit.data.pictures import BrokenPicture, Pictures, SkippedPictures
from ssl_vit.errors import UserError
from ssl_vit.models.weights import LoadedBackbone

BATCH_PIXELS = 2**20  # of fitted pictures in one forward pass
WAITING_PIXELS = 2**25  # of pictures at their own size that wait for others of their fitted size


class Attended(NamedTuple):
    """One picture and what each network sees in it."""

    place: int  # among the pictures
    picture: Tensor  # (C, H, W) uint8, at its own size
    sights: list[Sight]  # one per network


class _Waiting(NamedTuple):
    place: int
    picture: Tensor  # (C, H, W) uint8
    fitted: Tensor  # (C, h, w) uint8


def attend(
    pictures: Pictures,
    indices: Iterable[int],
    *,
    networks: list[LoadedBackbone],
    max_side: int | None,
    skipped: SkippedPictures,
) -> Iterator[Attended]:
    """What networks see in every picture that can be read, in the order in which batches fill up.

    Args:
        pictures: Of any size and aspect.
        indices: Which of them.
        networks: Of one architecture.
        max_side: Larger pictures are reduced to this many pixels for the networks; None: never.
        skipped: Receives every picture that is left out, with the reason.
    """
    config = networks[0].backbone.config
    waiting: dict[torch.Size, list[_Waiting]] = defaultdict(list)
    for index in indices:
        try:
            picture = pictures.read(index, config.in_chans)
            fitted = fit_to_patches(picture, config.patch_size, max_side)
        except BrokenPicture as broken:
            skipped.record(broken)
            continue
        except UserError as too_small:
            skipped.record(BrokenPicture(pictures.name(index), str(too_small)))
            continue
        same = waiting[fitted.shape]
        same.append(_Waiting(index, picture, fitted))
        if len(same) * fitted[0].numel() >= BATCH_PIXELS:
            yield from _attend_batch(waiting.pop(fitted.shape), networks)
        while sum(item.picture[0].numel() for group in waiting.values() for item in group) > WAITING_PIXELS:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]) * shape.numel())
            yield from _attend_batch(waiting.pop(fullest), networks)
    for batch in waiting.values():
        yield from _attend_batch(batch, networks)


def _attend_batch(batch: list[_Waiting], networks: list[LoadedBackbone]) -> Iterator[Attended]:
    device = networks[0].backbone.vit.patch_embed.proj.weight.device
    pixels = torch.stack([item.fitted for item in batch]).to(device).float() / 255  # (B, C, h, w)
    sights = [look(network.backbone, normalise(pixels, network)) for network in networks]
    for item, *of_picture in zip(batch, *sights, strict=True):
        yield Attended(item.place, item.picture, of_picture)


def normalise(pixels: Tensor, network: LoadedBackbone) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1] as the network was trained to see them."""
    mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (network.mean, network.std))
    return (pixels - mean) / std
