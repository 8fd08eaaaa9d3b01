"""What SiT does to images for the model to undo: quarter turns, and blocks of gray, blur, noise, other images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.config.methods import CorruptionConfig
from ssl_vit.data.transforms.separable_filter import blur, blur_weights
from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.rng import RNGStream, fold_in, normal, uniform, view_keys
from ssl_vit.runtime.workers import single_threaded

_SMALLEST_SIDE = 0.05  # of the gray and the blurred block, share of the image's side
_MOST_BLOCKS = 64  # of noise and of other images; 29 are the most seen at 32 px with the default sides
_BLUR_RADIUS = 7  # pixels
_BLUR_SIGMA = 0.1, 5.1  # pixels
_BLOCK = 1 << 20  # values that a CPU corrupts at once, though at least four images: of 2^17 to 2^23 about the fastest


class CorruptionResult(NamedTuple):
    """A batch after corruption."""

    dataset: Tensor  # (B, C, H, W)
    mask: Tensor  # (B, 1, H, W) bool: where noise or another image hides the original


class Corruption:
    """The corruption of SiT v1 (Atito, Awais & Kittler, 2021; code v1.1), at any image size.

    Three departures: images that lend blocks are always clean, who lends to whom is fixed by their places in the
    batch, whose order is random already, and the blur reads past its block's border. So what happens to an image
    depends on its key and its neighbors alone, and a batch may be spread over processes in multiples of four.
    """

    def __init__(self, config: CorruptionConfig) -> None:
        self.config = config

    def __call__(self, x: Tensor, key: Tensor, *, view: int) -> CorruptionResult:
        """Corrupt images; `x` stays as it is, and so does every pixel outside the blocks.

        Args:
            x: (B, C, H, W) float, normalized; one view of each image.
            key: The views' keys (B,) int64, all randomness derives from them; on the CPU, which then never waits for
                a GPU.
            view: 0 or 1. The image at place i lends blocks to that at i ^ 1 in view 0, at i ^ 2 in view 1: with the
                same lender in both views the model could tell the pair by its blocks. Without an image at that
                place nothing is replaced.
        """
        corrupted = CorruptionResult(torch.empty_like(x), torch.empty_like(x[:, :1], dtype=torch.bool))
        if x.device.type != "cpu":
            self._corrupt(x, key, *corrupted, view=view)
            return corrupted
        most = max(4, _BLOCK // x[0].numel() // 4 * 4)
        with single_threaded():
            for part in zip(*(torch.split(each, most) for each in (x, key, *corrupted)), strict=True):
                self._corrupt(*part, view=view)
        return corrupted

    def _corrupt(self, x: Tensor, key: Tensor, out: Tensor, mask: Tensor, *, view: int) -> None:
        """Corrupt images that lend blocks to each other alone: `x` into `out` and `mask`."""
        gray = _blocks(fold_in(key, RNGStream.GRAY_BLOCK), x, p=self.config.gray)
        blurred = _blocks(fold_in(key, RNGStream.BLUR_BLOCK), x, p=self.config.blur)
        noisy, replaced = (
            _blocks(fold_in(key, stream), x, p=many.p, side=many.size, max_area=many.max_area)
            for stream, many in (
                (RNGStream.NOISE_BLOCKS, self.config.noise),
                (RNGStream.REPLACE_BLOCKS, self.config.replace),
            )
        )
        noise_key = to_device_async(fold_in(key, RNGStream.NOISE), x.device)
        noise = normal(noise_key, x[0].numel(), where=noisy.expand(x.shape).flatten(1)).view(x.shape).to(x.dtype)
        place = torch.arange(len(x), device=x.device)
        lender = place ^ (1 << view)
        present = lender < len(x)
        replaced &= present[:, None, None, None]
        lender = torch.where(present, lender, place)

        now = torch.where(gray, x.mean(dim=1, keepdim=True), x)
        smooth = now.clone(memory_format=torch.contiguous_format)
        _blur(smooth, fold_in(key, RNGStream.BLUR_SIGMA))
        torch.where(blurred, smooth, now, out=now)
        torch.where(noisy, noise, now, out=now)
        torch.where(replaced, x.index_select(0, lender), now, out=out)
        torch.logical_or(noisy, replaced, out=mask)


def rotate(x: Tensor, quarter: Tensor) -> Tensor:
    """Turn square images clockwise.

    Args:
        x: (B, C, S, S).
        quarter: Quarter turns (B,), each 0, 1, 2 or 3.

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
    """By how much SiT turns the two views of samples with keys (B,): quarter turns (B, 2) of 0 to 3."""
    return (uniform(fold_in(view_keys(key, 0, 2), RNGStream.ROTATION), 1) * 4).long().squeeze(-1)


def corrupt_views(corrupt: Corruption, clean: Tensor, key: Tensor) -> CorruptionResult:
    """Corrupt each view within itself: lenders are other images of the same view.

    Args:
        corrupt: By which settings.
        clean: (2B, C, H, W) float, normalized: one view of each image, then the other.
        key: The samples' keys (B,).
    """
    keys = view_keys(key, 0, 2).unbind(1)  # (B,) each
    views = [corrupt(clean_view, keys[view], view=view) for view, clean_view in enumerate(clean.chunk(2))]
    return CorruptionResult(*map(torch.cat, zip(*views, strict=True)))


def _blocks(
    key: Tensor,
    x: Tensor,
    *,
    p: float,
    side: tuple[float, float] = (_SMALLEST_SIDE, 1.0),
    max_area: float | None = None,
) -> Tensor:
    """Mask (B, 1, H, W) of random rectangles for images x, each with probability p; cut off at the border.

    Without `max_area` one rectangle; with it, as SiT v1 does, rectangles are added while the sum of their areas,
    overlaps counted twice, is below a target drawn from [0, max_area] of the image.
    """
    height, width = x.shape[2:]
    count = 1 if max_area is None else _MOST_BLOCKS
    chosen, target, place = torch.split(uniform(key, 2 + 4 * count), [1, 1, 4 * count], dim=1)
    shown = chosen < p  # (B, 1)
    along, across = place.view(-1, 2, 2, count).unbind(dim=1)  # (B, 2, K) each
    top, bottom = _stretch(*along.unbind(dim=1), size=height, side=side)  # (B, K) each
    left, right = _stretch(*across.unbind(dim=1), size=width, side=side)
    if max_area is not None:
        area = (bottom - top) * (right - left)
        shown = shown & (area.cumsum(dim=1) - area < target * max_area * height * width)  # (B, K)
    used = slice(int(shown.sum(dim=1).max()))  # the first ones
    edges = to_device_async(torch.stack([top, bottom.where(shown, 0), left, right])[..., used], x.device)
    top, bottom, left, right = edges.unsqueeze(-1)  # (B, K, 1) each
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = (top <= row) & (row < bottom)  # (B, K, H)
    columns = (left <= column) & (column < right)  # (B, K, W)
    mask: Tensor = (rows.float().mT @ columns.float() > 0).unsqueeze(1)
    return mask


def _stretch(place: Tensor, length: Tensor, *, size: int, side: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """First pixel and end (B, K) of stretches of an axis, from draws in [0, 1) of place and length."""
    shortest = max(1, int(side[0] * size))
    longest = max(shortest + 1, int(side[1] * size))  # exclusive
    start = (place * (size - shortest)).long()
    return start, (start + shortest + (length * (longest - shortest)).long()).clamp(max=size)


def _blur(x: Tensor, key: Tensor) -> None:
    """Blur each image (B, C, H, W) with a sigma and a kernel width of its own; in place."""
    draws = to_device_async(uniform(key, 2).to(x.dtype), x.device)
    low, high = _BLUR_SIGMA
    sigma = low + (high - low) * draws[:, 0]
    radius = (3 + draws[:, 1] * 13).long() // 2  # (B,): kernels of 3, 5, 5, 7, 7, ..., 15, 15 pixels
    rows, cols = (blur_weights(sigma, size=size, reach=_BLUR_RADIUS, radius=radius) for size in x.shape[2:])
    blur(x, rows, cols)
