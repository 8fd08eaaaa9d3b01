"""What a score must be held against: raw pixels, and the same network with random weights."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.config import Workers
from ssl_vit.data.loading import eval_loader
from ssl_vit.data.pictures import Pictures, SkippedPictures
from ssl_vit.evaluation.features import Features
from ssl_vit.transforms.evaluation import EvalTransform

PIXELS = 32  # larger pictures are reduced to this side


def raw_pixels(
    pictures: Pictures,
    transform: EvalTransform,
    *,
    channels: int,
    batch_size: int,
    workers: Workers,
    skipped: SkippedPictures,
) -> Features:
    """Pixel values in [0, 1] in place of a network's features: one block of C·S·S of them, no patch tokens.

    The pictures are cut as for the network; sides above 32 pixels are reduced to 32.
    """
    loader = eval_loader(
        pictures, transform, batch_size=batch_size, workers=workers, channels=channels, skipped=skipped
    )
    rows, places = [], []
    for batch, indices in loader:
        rows.append(_reduced(batch.float() / 255).flatten(1))
        places.append(indices)
    index = torch.cat(places)
    pixels = torch.cat(rows).unsqueeze(1)  # (N, 1, D)
    return Features(pixels, pixels.new_empty(len(pixels), 0), pictures.labels[index], index)


def centred(features: Features, mean: Tensor) -> Features:
    """The features without their training mean (1, D): else a picture's brightness decides over the cosine."""
    return replace(features, cls=features.cls - mean)


def _reduced(images: Tensor) -> Tensor:
    if images.shape[-1] <= PIXELS:
        return images
    return F.interpolate(images, size=(PIXELS, PIXELS), mode="bilinear", antialias=True)
