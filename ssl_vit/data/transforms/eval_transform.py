"""What an image goes through before its features are taken: resize, center crop, normalize. Nothing random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv


class EvalTransform:
    """Images of any size as center crops of one size.

    Args:
        image_size: Side S of the crop, in pixels.
        crop_ratio: S over the short side that an image is resized to: 0.875 cuts 224 out of 256.
        mean: Per channel, of images in [0, 1].
        std: Per channel.
    """

    def __init__(self, image_size: int, crop_ratio: float, mean: Sequence[float], std: Sequence[float]) -> None:
        self.image_size = image_size
        self.crop_ratio = crop_ratio
        self.mean = list(mean)
        self.std = list(std)

    def __call__(self, image: Tensor) -> Tensor:
        """The crop (C, S, S) uint8 of an image (C, H, W) uint8; one that is S x S already is used as it is."""
        if image.shape[1:] == (self.image_size, self.image_size):
            return image
        short = round(self.image_size / self.crop_ratio)
        resized = tv.resize(image, [short], InterpolationMode.BICUBIC, antialias=True)
        crop: Tensor = tv.center_crop(resized, [self.image_size, self.image_size])
        return crop

    def normalize(self, batch: Tensor) -> Tensor:
        """Float images (B, C, S, S), as the model wants them, from uint8 ones."""
        x = batch.float().div_(255)
        mean, std = x.new_tensor([self.mean, self.std]).view(2, -1, 1, 1)
        return x.sub_(mean).div_(std)

    def describe(self) -> dict[str, Any]:
        """The protocol, for the record of a result."""
        return {
            "image_size": self.image_size,
            "crop_ratio": self.crop_ratio,
            "resize": "short side to image_size / crop_ratio, bicubic, antialias; images of image_size as they are",
            "mean": self.mean,
            "std": self.std,
        }
