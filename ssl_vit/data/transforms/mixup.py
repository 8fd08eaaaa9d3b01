"""Augmentation for supervised training: timm's RandAugment, random erasing, mixup and cutmix.

timm uses the global generators of the process. They are seeded with an image's key, or for a mixed batch with the key
of its first image, so that an image of an epoch is augmented identically in every process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ssl_vit.config.evaluate import AugmentationConfig, RandAugmentConfig
from ssl_vit.config.methods import BlurConfig, CropsConfig, JitterConfig, ViewsConfig
from ssl_vit.data.batch import Batch
from ssl_vit.runtime.rng import RNGStream, fold_in, seeded_global_rng


class RandAugment:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719) with increasing magnitudes, such as `rand-m9-mstd0.5-inc1`.

    Translations are at most 0.45 of the images' `size` in pixels; `mean` in [0, 1] fills what they uncover.
    """

    def __init__(self, config: RandAugmentConfig, *, size: int, mean: Sequence[float]) -> None:
        self.operations = rand_augment_transform(
            f"rand-m{config.magnitude:g}-n{config.layers}-mstd{config.std:g}-inc1",
            {
                "translate_const": int(0.45 * size),
                "img_mean": tuple(round(255 * level) for level in (*mean, *mean, *mean)[:3]),  # gray: three times
                "interpolation": Image.Resampling.BICUBIC,
                "magnitude_max": 9.99,  # at 10 timm posterizes to 0 bits, an error in Pillow
            },
        )

    def __call__(self, batch: Batch) -> Batch:
        """Augment the first view of the batch in place, each image as a function of its key."""
        seeds = fold_in(batch.key, RNGStream.RAND_AUGMENT).tolist()
        with seeded_global_rng() as seed:
            for image, key in zip(batch.global_views[:, 0], seeds, strict=True):
                seed(key)
                color = image.expand(3, -1, -1).permute(1, 2, 0)  # (H, W, 3), gray as three equal channels
                augmented = self.operations(Image.fromarray(color.contiguous().numpy()))
                image.copy_(torch.from_numpy(np.array(augmented)).permute(2, 0, 1)[: len(image)])
        return batch


class MixupCutmix:
    """Random erasing, then mixup or cutmix, of normalized images."""

    def __init__(self, config: AugmentationConfig, classes: int) -> None:
        self.classes = classes
        self.smoothing = config.smoothing
        self.erase = config.erasing > 0
        self.erasing = RandomErasing(config.erasing, mode="pixel", device="cpu")
        self.mix = config.mixup > 0 or config.cutmix > 0
        self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes)

    def __call__(self, images: Tensor, labels: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Augment images (B, C, H, W) float in place; return them with soft targets (B, classes) that sum to 1.

        The labels (B,) and keys (B,) are int64, the keys on the CPU. B is even where images are mixed.
        """
        with seeded_global_rng() as seed:
            if self.erase:
                for image, own_key in zip(images, fold_in(key, RNGStream.ERASING).tolist(), strict=True):
                    seed(own_key)
                    self.erasing(image)
            if not self.mix:
                return images, mixup_target(labels, self.classes, 1.0, self.smoothing)
            seed(int(fold_in(key[:1], RNGStream.MIX)))
            images, targets = self.mixup(images, labels)
            return images, targets


def single_view_config(
    config: AugmentationConfig, size: int, mean: Sequence[float], std: Sequence[float]
) -> ViewsConfig:
    """Build the config of one cropped, flipped and normalized view per image, without color augmentation."""
    no_jitter = JitterConfig(p=0, brightness=0, contrast=0, saturation=0, hue=0)
    return ViewsConfig(
        global_crops=CropsConfig(count=1, size=size, **config.crops.model_dump()),
        local_crops=CropsConfig(count=0, size=size, **config.crops.model_dump()),
        flip=config.flip,
        jitter=no_jitter,
        grayscale=0,
        blur=BlurConfig(p=(0, 0, 0), sigma=(0, 1)),
        solarize=(0, 0, 0),
        mean=list(mean),
        std=list(std),
    )
