"""The corruption of SiT: random rotations, and blocks of gray, blur, noise or pixels of other images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.config.methods import CorruptionConfig
from ssl_vit.data.transforms.gaussian_blur import blur, blur_weights
from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.rng import RNGStream, fold_in, normal, uniform, view_keys
from ssl_vit.runtime.workers import single_threaded

_MIN_SIDE = 0.05  # of the gray and the blurred block, fraction of the image's side
_MAX_BLOCKS = 64  # of noise and of other images; at 32 px with the default sides at most 29 occurred
_BLUR_RADIUS = 7  # pixels
_BLUR_SIGMA = 0.1, 5.1  # pixels
_CHUNK = 1 << 20  # values per chunk on a CPU, at least four images: of 2^17 to 2^23 about the fastest


class CorruptionResult(NamedTuple):
    """A batch after corruption."""

    images: Tensor  # (B, C, H, W)
    mask: Tensor  # (B, 1, H, W) bool: pixels replaced by noise or another image


class Corruption:
    """The corruption of SiT v1 (Atito, Awais & Kittler, 2021; code v1.1), at any image size.

    Three differences: replacement blocks come from clean images, the source of an image's blocks is fixed by its
    position in the (already shuffled) batch, and the blur reads past its block's border. So the result for an image
    depends on its key and its neighbors only, and a batch may be split over processes in multiples of four.
    """

    def __init__(self, config: CorruptionConfig) -> None:
        self.config = config

    def __call__(self, x: Tensor, key: Tensor, *, view: int) -> CorruptionResult:
        """Corrupt images into new tensors; pixels outside the blocks are copied.

        Args:
            x: (B, C, H, W) float, normalized; one view of each image.
            key: The views' keys (B,) int64; best on the CPU, so that it does not wait for a GPU.
            view: 0 or 1. Blocks of image i come from image i ^ 1 in view 0 and i ^ 2 in view 1: with the same source
                in both views the model could recognize the pair by its blocks. If that index is not in the batch,
                nothing is replaced.
        """
        result = CorruptionResult(torch.empty_like(x), torch.empty_like(x[:, :1], dtype=torch.bool))
        if x.device.type != "cpu":
            self._corrupt(x, key, *result, view=view)
            return result
        chunk = max(4, _CHUNK // x[0].numel() // 4 * 4)
        with single_threaded():
            for part in zip(*(torch.split(each, chunk) for each in (x, key, *result)), strict=True):
                self._corrupt(*part, view=view)
        return result

    def _corrupt(self, x: Tensor, key: Tensor, out: Tensor, mask: Tensor, *, view: int) -> None:
        """Corrupt `x` (a multiple of four images, or the rest of the batch) into `out` and `mask`."""
        gray = _block_mask(fold_in(key, RNGStream.GRAY_BLOCK), x, p=self.config.gray)
        blurred = _block_mask(fold_in(key, RNGStream.BLUR_BLOCK), x, p=self.config.blur)
        noisy, replaced = (
            _block_mask(fold_in(key, stream), x, p=config.p, side=config.size, max_area=config.max_area)
            for stream, config in (
                (RNGStream.NOISE_BLOCKS, self.config.noise),
                (RNGStream.REPLACE_BLOCKS, self.config.replace),
            )
        )
        noise_key = to_device_async(fold_in(key, RNGStream.NOISE), x.device)
        noise = normal(noise_key, x[0].numel(), where=noisy.expand(x.shape).flatten(1)).view(x.shape).to(x.dtype)
        index = torch.arange(len(x), device=x.device)
        source = index ^ (1 << view)
        present = source < len(x)
        replaced &= present[:, None, None, None]
        source = torch.where(present, source, index)

        corrupted = torch.where(gray, x.mean(dim=1, keepdim=True), x)
        smooth = corrupted.clone(memory_format=torch.contiguous_format)
        _blur(smooth, fold_in(key, RNGStream.BLUR_SIGMA))
        torch.where(blurred, smooth, corrupted, out=corrupted)
        torch.where(noisy, noise, corrupted, out=corrupted)
        torch.where(replaced, x.index_select(0, source), corrupted, out=out)
        torch.logical_or(noisy, replaced, out=mask)


def rotate(x: Tensor, quarter: Tensor) -> Tensor:
    """Rotate square images (B, C, S, S) clockwise by quarter turns (B,), each 0, 1, 2 or 3.

    Example:
        >>> x = torch.tensor([[[[1, 2], [3, 4]]]])
        >>> rotate(x, torch.tensor([1])).tolist()
        [[[[3, 1], [4, 2]]]]
    """
    quarter = quarter[:, None, None, None]
    x = torch.where(quarter % 2 == 1, x.mT, x)
    x = torch.where((quarter == 1) | (quarter == 2), x.flip(-1), x)
    return torch.where(quarter >= 2, x.flip(-2), x)


def sample_rotations(key: Tensor) -> Tensor:
    """Sample the rotations (B, 2) of the two views of samples with keys (B,): quarter turns 0 to 3."""
    return (uniform(fold_in(view_keys(key, 0, 2), RNGStream.ROTATION), 1) * 4).long().squeeze(-1)


def corrupt_views(corrupt: Corruption, clean: Tensor, key: Tensor) -> CorruptionResult:
    """Corrupt two normalized views of each image with keys (B,): first views, then second ones, (2B, C, H, W) float.

    Replacement blocks come from other images of the same view.
    """
    keys = view_keys(key, 0, 2).unbind(1)  # (B,) each
    views = [corrupt(clean_view, keys[view], view=view) for view, clean_view in enumerate(clean.chunk(2))]
    return CorruptionResult(*map(torch.cat, zip(*views, strict=True)))


def _block_mask(
    key: Tensor,
    x: Tensor,
    *,
    p: float,
    side: tuple[float, float] = (_MIN_SIDE, 1.0),
    max_area: float | None = None,
) -> Tensor:
    """Sample masks (B, 1, H, W) of random rectangles, clipped at the border, for images x, each with probability p.

    Without `max_area` there is one rectangle. With it, as in SiT v1, rectangles are added while the sum of their areas,
    overlaps counted twice, is below a random target in [0, max_area] of the image.
    """
    height, width = x.shape[2:]
    count = 1 if max_area is None else _MAX_BLOCKS
    selected, target, position = torch.split(uniform(key, 2 + 4 * count), [1, 1, 4 * count], dim=1)
    shown = selected < p  # (B, 1)
    vertical, horizontal = position.view(-1, 2, 2, count).unbind(dim=1)  # (B, 2, K) each
    top, bottom = _interval(*vertical.unbind(dim=1), size=height, side=side)  # (B, K) each
    left, right = _interval(*horizontal.unbind(dim=1), size=width, side=side)
    if max_area is not None:
        area = (bottom - top) * (right - left)
        shown = shown & (area.cumsum(dim=1) - area < target * max_area * height * width)  # (B, K)
    used = slice(int(shown.sum(dim=1).max()))  # shown rectangles come first
    edges = to_device_async(torch.stack([top, bottom.where(shown, 0), left, right])[..., used], x.device)
    top, bottom, left, right = edges.unsqueeze(-1)  # (B, K, 1) each
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = (top <= row) & (row < bottom)  # (B, K, H)
    columns = (left <= column) & (column < right)  # (B, K, W)
    mask: Tensor = (rows.float().mT @ columns.float() > 0).unsqueeze(1)
    return mask


def _interval(position: Tensor, length: Tensor, *, size: int, side: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return first pixel and end (B, K) of intervals of an axis, from position and length in [0, 1)."""
    shortest = max(1, int(side[0] * size))
    longest = max(shortest + 1, int(side[1] * size))  # exclusive
    start = (position * (size - shortest)).long()
    return start, (start + shortest + (length * (longest - shortest)).long()).clamp(max=size)


def _blur(x: Tensor, key: Tensor) -> None:
    """Blur each image (B, C, H, W) with its own sigma and kernel width, in place."""
    draws = to_device_async(uniform(key, 2).to(x.dtype), x.device)
    low, high = _BLUR_SIGMA
    sigma = low + (high - low) * draws[:, 0]
    radius = (3 + draws[:, 1] * 13).long() // 2  # (B,): kernels of 3, 5, 5, 7, 7, ..., 15, 15 pixels
    rows, cols = (blur_weights(sigma, size=size, reach=_BLUR_RADIUS, radius=radius) for size in x.shape[2:])
    blur(x, rows, cols)
