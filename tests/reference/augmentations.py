"""Slow textbook forms of the transforms: DINO's PIL pipeline, photometrics view by view, SiT's blocks one by one."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as tv1
from torchvision.transforms.v2 import functional as tv

from ssl_vit.config.methods import CorruptionConfig, ViewsConfig
from ssl_vit.runtime.rng import RNGStream, fold_in, normal, uniform, view_keys


def photograph(file: Path) -> Tensor:
    """An image file as (3, H, W) uint8."""
    return tv.pil_to_tensor(Image.open(file).convert("RGB"))


def dino_view(
    image: Image.Image, *, size: int, scale: tuple[float, float], blur: float, solarize: float
) -> Image.Image:
    """One random view, as the DINO paper's augmentation makes it, before normalization."""
    view = tv1.RandomResizedCrop(size, scale=scale, interpolation=tv1.InterpolationMode.BICUBIC)(image)
    view = tv1.RandomHorizontalFlip(0.5)(view)
    view = tv1.RandomApply([tv1.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8)(view)
    view = tv1.RandomGrayscale(p=0.2)(view)
    if random.random() < blur:
        view = view.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))
    if random.random() < solarize:
        view = ImageOps.solarize(view)
    return view


def textbook_views(file: Path, views: ViewsConfig) -> list[Tensor]:
    """All views of an image file, global ones first, as a plain data set of torchvision's transforms gives them.

    One after the other from one decoded image: box, flip, jitter, gray, blur and solarize of the DINO paper with
    `dino_view`'s strengths, then a normalized float tensor (3, S, S).
    """
    image = Image.open(file).convert("RGB")
    normalize = tv1.Compose([tv1.ToTensor(), tv1.Normalize(views.mean, views.std)])
    kinds = [(views.global_crops, i) for i in range(views.global_crops.count)]
    kinds += [(views.local_crops, 2)] * views.local_crops.count
    return [
        normalize(dino_view(image, size=kind.size, scale=kind.scale, blur=views.blur.p[i], solarize=views.solarize[i]))
        for kind, i in kinds
    ]


def jittered(x: Tensor, order: list[int], factor: list[float], hue: float) -> Tensor:
    """An image (C, H, W) in [0, 1] after torchvision's four operations, in the given order."""
    operations = (
        lambda y: tv.adjust_brightness(y, factor[0]),
        lambda y: tv.adjust_contrast(y, factor[1]),
        lambda y: tv.adjust_saturation(y, factor[2]),
        lambda y: tv.adjust_hue(y, hue),
    )
    for which in order:
        x = operations[which](x)
    return x


def blurred(x: Tensor, sigma: float, *, reach: int, radius: int | None = None) -> Tensor:
    """An image (C, H, W) after a Gaussian blur, the same for rows and columns, that goes on past its border."""
    offset = torch.arange(-reach, reach + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offset / max(sigma, 1e-3)) ** 2) * (
        offset.abs() <= (reach if radius is None else radius)
    )
    kernel /= kernel.sum()
    x = F.pad(x.unsqueeze(1), [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).squeeze(1)


def photometric(
    config: ViewsConfig, views: Tensor, key: Tensor, first_view: int = 0, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Views (B, V, C, H, W) float after the changes, one view after another, by torchvision's operations."""
    low, high = config.blur.sigma
    strength = torch.tensor([config.jitter.brightness, config.jitter.contrast, config.jitter.saturation])
    out = []
    for views_of_one, keys in zip(views, view_keys(key, first_view, views.shape[1]), strict=True):
        for number, (view, one) in enumerate(zip(views_of_one, keys, strict=True), start=first_view):
            kind = min(number, 2)
            draws = {stream: uniform(fold_in(one, stream), 9) for stream in RNGStream}
            jitter, blur, gray, solarize = (
                draws[stream] for stream in (RNGStream.JITTER, RNGStream.BLUR, RNGStream.GRAYSCALE, RNGStream.SOLARIZE)
            )
            x = view.to(dtype) / 255
            if jitter[0] < config.jitter.p:
                least = (1 - strength).clamp(min=0)
                factor = least + (1 + strength - least) * jitter[1:4]
                x = jittered(
                    x, jitter[5:].argsort().tolist(), factor.tolist(), config.jitter.hue * float(2 * jitter[4] - 1)
                )
            if gray[0] < config.grayscale and len(x) == 3:
                x = tv.rgb_to_grayscale(x, num_output_channels=3)
            if blur[0] < config.blur.p[kind]:
                x = blurred(x, float(low + (high - low) * blur[1]), reach=math.ceil(4 * high))
            if solarize[0] < config.solarize[kind]:
                x = torch.where(x.float() >= 128 / 255, 1 - x, x)
            out.append(tv.normalize(x, config.mean, config.std))
    return torch.stack(out).view(views.shape)


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


def rectangles(
    draws: Tensor,
    size: tuple[int, int],
    *,
    p: float,
    side: tuple[float, float] = (0.05, 1.0),
    max_area: float | None = None,
) -> Tensor:
    """A mask (height, width) of random rectangles from draws in [0, 1), one after another."""
    mask, total = torch.zeros(size, dtype=torch.bool), 0
    if draws[0] >= p:
        return mask
    blocks = draws[2:].view(2, 2, -1).tolist()
    for k in range(len(blocks[0][0])):
        if max_area is not None and total >= float(draws[1]) * max_area * size[0] * size[1]:
            break
        edges = []
        for (place, length), pixels in zip(blocks, size, strict=True):
            shortest = max(1, int(side[0] * pixels))
            longest = max(shortest + 1, int(side[1] * pixels))
            start = int(place[k] * (pixels - shortest))
            edges.append((start, min(start + shortest + int(length[k] * (longest - shortest)), pixels)))
        (top, bottom), (left, right) = edges
        mask[top:bottom, left:right] = True
        total += (bottom - top) * (right - left)
    return mask


def corruption(config: CorruptionConfig, x: Tensor, key: Tensor, *, view: int) -> tuple[Tensor, Tensor]:
    """SiT's corruption of images (B, C, H, W), one after another; and what it hides (B, 1, H, W)."""
    size = x.shape[2], x.shape[3]
    dataset, masks = [], []
    for i, (clean, one) in enumerate(zip(x, key, strict=True)):
        gray, blur = (
            rectangles(uniform(fold_in(one, stream), 6), size, p=p)
            for stream, p in ((RNGStream.GRAY_BLOCK, config.gray), (RNGStream.BLUR_BLOCK, config.blur))
        )
        noisy, replaced = (
            rectangles(
                uniform(fold_in(one, stream), 2 + 4 * 64), size, p=many.p, side=many.size, max_area=many.max_area
            )
            for stream, many in ((RNGStream.NOISE_BLOCKS, config.noise), (RNGStream.REPLACE_BLOCKS, config.replace))
        )
        image = clean.where(~gray, clean.mean(dim=0))
        sigma, radius = uniform(fold_in(one, RNGStream.BLUR_SIGMA), 2).tolist()
        image = image.where(~blur, blurred(image, 0.1 + 5 * sigma, reach=7, radius=int(3 + 13 * radius) // 2))
        image = image.where(~noisy, normal(fold_in(one, RNGStream.NOISE), clean.numel()).view_as(clean))
        lender = i ^ (1 << view)
        if lender < len(x):
            image = image.where(~replaced, x[lender])
        else:
            replaced[:] = False
        dataset.append(image)
        masks.append(noisy | replaced)
    return torch.stack(dataset), torch.stack(masks).unsqueeze(1)


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
