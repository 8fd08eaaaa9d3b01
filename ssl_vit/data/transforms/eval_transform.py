"""The evaluation transform: resize, center crop, normalize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv


@dataclass(eq=False)
class EvalTransform:
    """Resize and center crop to one size; normalization is separate, for the device."""

    image_size: int  # side S of the crop, in pixels
    crop_ratio: float  # S / the short side after resizing: 0.875 crops 224 from 256
    mean: list[float]  # per channel, of images in [0, 1]
    std: list[float]  # per channel

    def __call__(self, image: Tensor) -> Tensor:
        """Transform an image (C, H, W) uint8 to (C, S, S) uint8; an image of S x S is returned unchanged."""
        if image.shape[1:] == (self.image_size, self.image_size):
            return image
        short = round(self.image_size / self.crop_ratio)
        resized = tv.resize(image, [short], InterpolationMode.BICUBIC, antialias=True)
        crop: Tensor = tv.center_crop(resized, [self.image_size, self.image_size])
        return crop

    def normalize(self, batch: Tensor) -> Tensor:
        """Convert images (B, C, S, S) uint8 to normalized float."""
        x = batch.float().div_(255)
        mean, std = x.new_tensor([self.mean, self.std]).view(2, -1, 1, 1)
        return x.sub_(mean).div_(std)

    def describe(self) -> dict[str, Any]:
        """Return the settings as they are stored in results."""
        return {
            "image_size": self.image_size,
            "crop_ratio": self.crop_ratio,
            "resize": "short side to image_size / crop_ratio, bicubic, antialias; images of image_size as they are",
            "mean": self.mean,
            "std": self.std,
        }
