"""What a score must be held against: raw pixels, and the same model with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.features.extractor import Described, Features

_ROWS = 4096  # images at a time
PIXELS = 32  # larger images are reduced to this side


class RawPixelExtractor:
    """The pixels themselves in place of a model's tokens; a `Describer`.

    Args:
        transform: Has cut the images as for the model.
        channels: That they have.
    """

    title = "raw pixels"
    blocks = most_blocks = 1

    def __init__(self, transform: EvalTransform, *, channels: int) -> None:
        self.transform = transform
        self.channels = channels
        self.shape = (channels * min(transform.image_size, PIXELS) ** 2, 0)

    def identity(self) -> dict[str, Any]:
        """How the images are cut and reduced."""
        cut = {key: value for key, value in self.transform.describe().items() if key not in ("mean", "std")}
        return {"kind": "raw pixels", "channels": self.channels, "largest_side": PIXELS, "transform": cut}

    def tolerance(self) -> float:
        """Float16 moves a value by 0.05 % at most."""
        return 0.005

    def __call__(self, images: Tensor) -> Iterator[Described]:
        """Values in [0, 1] of images (B, C, S, S) uint8."""
        pixels = _reduced(images.float() / 255).flatten(1).unsqueeze(1)  # (B, 1, D)
        yield Described(pixels, pixels.new_empty(len(pixels), 0))


def mean_of(features: Features) -> Tensor:
    """The mean [CLS] of all images (blocks, D) float32, read some at a time."""
    total = sum(part.float().sum(dim=0).double() for part in torch.split(features.cls, _ROWS))
    return torch.as_tensor(total / len(features.cls)).float()


def centerd(features: Features, mean: Tensor) -> Features:
    """The features without their training mean (1, D): else an image's brightness decides over the cosine."""
    parts = [(part - mean).to(part.dtype) for part in torch.split(features.cls, _ROWS)]
    return replace(features, cls=torch.cat(parts))


def _reduced(images: Tensor) -> Tensor:
    if images.shape[-1] <= PIXELS:
        return images
    return F.interpolate(images, size=(PIXELS, PIXELS), mode="bilinear", antialias=True)
