"""Raw pixels in place of features: a baseline that every score must exceed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.features.extractor import FeatureBatch, Features

_ROWS = 4096  # images at a time
PIXELS = 32  # side that larger images are downsampled to


class RawPixelExtractor:
    """Extract the pixels themselves in place of a model's tokens.

    Args:
        transform: Transform that has cropped the images as for the model.
        channels: Channels of the images.
    """

    title = "raw pixels"
    blocks = max_blocks = 1

    def __init__(self, transform: EvalTransform, *, channels: int) -> None:
        self.transform = transform
        self.channels = channels
        self.shape = (channels * min(transform.image_size, PIXELS) ** 2, 0)

    def identity(self) -> dict[str, Any]:
        """Return how the images are cropped and downsampled."""
        transform = {key: value for key, value in self.transform.describe().items() if key not in ("mean", "std")}
        return {"kind": "raw pixels", "channels": self.channels, "largest_side": PIXELS, "transform": transform}

    def tolerance(self) -> float:
        """Return ten times the largest relative rounding error of float16."""
        return 0.005

    def __call__(self, images: Tensor) -> Iterator[FeatureBatch]:
        """Yield the values in [0, 1] of images (B, C, S, S) uint8."""
        pixels = images.float() / 255
        if pixels.shape[-1] > PIXELS:
            pixels = F.interpolate(pixels, size=(PIXELS, PIXELS), mode="bilinear", antialias=True)
        pixels = pixels.flatten(1).unsqueeze(1)  # (B, 1, D)
        yield FeatureBatch(pixels, pixels.new_empty(len(pixels), 0))


def mean_cls(features: Features) -> Tensor:
    """Compute the mean [CLS] of all images (blocks, D) float32, in chunks."""
    total = sum(part.float().sum(dim=0).double() for part in torch.split(features.cls, _ROWS))
    return torch.as_tensor(total / len(features.cls)).float()


def center_cls(features: Features, mean: Tensor) -> Features:
    """Subtract the training mean (1, D) from the features: else an image's brightness dominates the cosine."""
    parts = [(part - mean).to(part.dtype) for part in torch.split(features.cls, _ROWS)]
    return replace(features, cls=torch.cat(parts))
