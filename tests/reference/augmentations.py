"""Slow textbook forms of the transforms: DINO's PIL pipeline, colour jitter one by one, SiT's blocks in a loop."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as tv1
from torchvision.transforms.v2 import functional as tv

from ssl_vit.config import ViewsConfig


def photograph(file: Path) -> Tensor:
    """A picture file as (3, H, W) uint8."""
    return tv.pil_to_tensor(Image.open(file).convert("RGB"))


def dino_view(
    picture: Image.Image, *, size: int, scale: tuple[float, float], blur: float, solarize: float
) -> Image.Image:
    """One random view, as the DINO paper's augmentation makes it, before normalisation."""
    view = tv1.RandomResizedCrop(size, scale=scale, interpolation=tv1.InterpolationMode.BICUBIC)(picture)
    view = tv1.RandomHorizontalFlip(0.5)(view)
    view = tv1.RandomApply([tv1.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8)(view)
    view = tv1.RandomGrayscale(p=0.2)(view)
    if random.random() < blur:
        view = view.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))
    if random.random() < solarize:
        view = ImageOps.solarize(view)
    return view


def textbook_views(file: Path, views: ViewsConfig) -> list[Tensor]:
    """All views of a picture file, global ones first, as a plain data set of torchvision's transforms gives them.

    One after the other from one decoded picture: box, flip, jitter, grey, blur and solarize of the DINO paper with
    `dino_view`'s strengths, then a normalised float tensor (3, S, S).
    """
    picture = Image.open(file).convert("RGB")
    normalise = tv1.Compose([tv1.ToTensor(), tv1.Normalize(views.mean, views.std)])
    kinds = [(views.global_crops, i) for i in range(views.global_crops.count)]
    kinds += [(views.local_crops, 2)] * views.local_crops.count
    return [
        normalise(
            dino_view(picture, size=kind.size, scale=kind.scale, blur=views.blur.p[i], solarize=views.solarize[i])
        )
        for kind, i in kinds
    ]


def jittered(x: Tensor, order: list[int], factor: list[float], hue: float) -> Tensor:
    """A picture (C, H, W) in [0, 1] after torchvision's four operations, in the given order."""
    operations = (
        lambda y: tv.adjust_brightness(y, factor[0]),
        lambda y: tv.adjust_contrast(y, factor[1]),
        lambda y: tv.adjust_saturation(y, factor[2]),
        lambda y: tv.adjust_hue(y, hue),
    )
    for which in order:
        x = operations[which](x)
    return x


def sit_union(size: int, *, max_area: float, side: tuple[float, float], rng: random.Random) -> np.ndarray:
    """SiT v1's loop: a mask (size, size) of blocks, added until their areas, counted one by one, reach the target."""
    shortest, longest = int(side[0] * size), int(side[1] * size)
    mask, total, target = np.zeros((size, size), bool), 0, rng.uniform(0, max_area) * size * size
    while total < target:
        top, left = rng.randrange(size - shortest), rng.randrange(size - shortest)
        bottom = min(top + rng.randrange(shortest, longest), size)
        right = min(left + rng.randrange(shortest, longest), size)
        mask[top:bottom, left:right] = True
        total += (bottom - top) * (right - left)
    return mask


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Largest distance between two samples' distribution functions, in units in which 1.95 has p = .001."""
    a, b = a.double().flatten().sort().values, b.double().flatten().sort().values
    both = torch.cat([a, b])
    share_a, share_b = (torch.searchsorted(each, both, right=True) / len(each) for each in (a, b))
    return float((share_a - share_b).abs().max() * (len(a) * len(b) / (len(a) + len(b))) ** 0.5)


def uniformity(draws: Tensor, low: float, high: float) -> float:
    """The same distance of a sample from the uniform distribution on [low, high]."""
    draws = ((draws.double().flatten() - low) / (high - low)).sort().values
    n = len(draws)
    steps = torch.arange(n + 1, dtype=torch.double) / n
    return float(torch.maximum((draws - steps[:-1]).abs().max(), (draws - steps[1:]).abs().max()) * n**0.5)
