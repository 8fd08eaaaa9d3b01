"""Color augmentation: jitter, grayscale, blur, solarization and normalization, batched, with parameters per view."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.config.methods import JitterConfig, ViewsConfig
from ssl_vit.data.transforms.gaussian_blur import BlurWeights, blur, blur_weights
from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.rng import RNGStream, fold_in, uniform, view_keys
from ssl_vit.runtime.workers import single_threaded

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_LUMA = (0.2989, 0.587, 0.114)
_SOLARIZE_THRESHOLD = 128 / 255 - 2.0**-24  # the float32 before 128/255
_MIN_CHROMA = 1e-9  # avoids a division by 0 for gray pixels
_BLOCK = 1 << 19  # values per block on a CPU: of 2^14 to 2^20 the fastest with 1 MiB of cache per core


class JitterParams(NamedTuple):
    """Color jitter of n views; `operations` are those with a strength above 0."""

    applied: Tensor  # (n,) bool
    order: Tensor  # (n, operations) int64: brightness 0, contrast 1, saturation 2, hue 3, in order of application
    factor: Tensor  # (n, 3) of brightness, contrast and saturation
    hue: Tensor  # (n,) fraction of the color circle


class ColorParams(NamedTuple):
    """The random parameters of n views, on the CPU."""

    jitter: JitterParams
    gray: Tensor  # (n,) bool
    blurred: Tensor  # (n,) bool
    sigma: Tensor  # (n,) pixels
    solarized: Tensor  # (n,) bool

    def select(self, views: Tensor | slice) -> ColorParams:
        """Return the parameters of some of the views."""
        return ColorParams(JitterParams(*(part[views] for part in self.jitter)), *(part[views] for part in self[1:]))


class ColorAugmentation:
    """Color augmentation of DINO: jitter, grayscale, blur, solarization, then normalization.

    The parameters of a view depend on its sample's key and its view number only, not on the batch. They are sampled on
    the CPU, identically for every device. A GPU processes all views at once; a CPU processes blocks that fit into its
    cache, of views with the same order of jitter.
    """

    def __init__(self, views: ViewsConfig) -> None:
        self.views = views

    def __call__(self, views: Tensor, key: Tensor, first_view: int = 0) -> Tensor:
        """Augment and normalize views (B, V, C, H, W) uint8, of one or three channels, to float32.

        The samples' keys (B,) int64 are best on the CPU, so that it does not wait for a GPU. `first_view` is the number
        of the first of the V views: 0 for global views, the number of global views for local ones. It enters the RNG
        key and selects the probabilities of view 0, view 1 or all later views.
        """
        batch, count, channels = views.shape[:3]
        keys = view_keys(key.cpu(), first_view, count).flatten()  # (N,), N = B*V
        kind = torch.arange(first_view, first_view + count).clamp(max=2).repeat(batch)  # (N,)
        params = self._sample_params(keys, kind, color=channels == 3)
        flat = views.flatten(0, 1)  # (N, C, H, W)
        if views.device.type != "cpu":
            return self._augment(flat, params, self._blur_weights(flat, params)).view(views.shape)
        with single_threaded():
            return self._augment_by_blocks(flat, params).view(views.shape)

    def _augment_by_blocks(self, views: Tensor, params: ColorParams) -> Tensor:
        """Augment and normalize views (N, C, H, W) in blocks that fit into the cache."""
        out = torch.empty(views.shape)
        order, blocks = _split_into_blocks(params, block_size=max(1, _BLOCK // math.prod(views.shape[1:])))
        params = params.select(order)
        rows, columns = self._blur_weights(views, params)
        blurred = slice(0)  # the block's among all blurred views
        for block in blocks:
            own = params.select(block)
            blurred = slice(blurred.stop, blurred.stop + int(own.blurred.sum()))
            weights = rows.select(blurred), columns.select(blurred)
            augmented = self._augment(views.index_select(0, order[block]), own, weights)
            for index, view in zip(order[block].tolist(), augmented, strict=True):
                out[index] = view  # three times as fast as index_copy_ of the block
        return out

    def _sample_params(self, keys: Tensor, kind: Tensor, *, color: bool) -> ColorParams:
        """Sample the parameters of views with keys (N,) and kinds (N,) 0, 1 or 2 (view 0, view 1, later views)."""
        jitter, (low, high) = self.views.jitter, self.views.blur.sigma
        if not color:
            jitter = jitter.model_copy(update={"saturation": 0, "hue": 0})
        blur_draws = uniform(fold_in(keys, RNGStream.BLUR), 2)  # (N, 2)
        gray, solarized = (
            uniform(fold_in(keys, stream), 1)[:, 0] for stream in (RNGStream.GRAYSCALE, RNGStream.SOLARIZE)
        )
        return ColorParams(
            jitter=sample_jitter_params(keys, jitter),
            gray=gray < (self.views.grayscale if color else 0),
            blurred=blur_draws[:, 0] < torch.tensor(self.views.blur.p)[kind],
            sigma=low + (high - low) * blur_draws[:, 1],
            solarized=solarized < torch.tensor(self.views.solarize)[kind],
        )

    def _blur_weights(self, views: Tensor, params: ColorParams) -> tuple[BlurWeights, BlurWeights]:
        """Compute the weights for rows and columns of the blurred views, cut off at 4 times the largest sigma."""
        sigma = to_device_async(params.sigma[params.blurred], views.device)
        reach = math.ceil(4 * self.views.blur.sigma[1])
        height, width = views.shape[2:]
        rows = blur_weights(sigma, size=height, reach=reach)
        return rows, rows if width == height else blur_weights(sigma, size=width, reach=reach)

    def _augment(self, views: Tensor, params: ColorParams, weights: tuple[BlurWeights, BlurWeights]) -> Tensor:
        """Augment and normalize views (n, C, H, W) uint8 to float32."""
        x = views.contiguous().float().div_(255)
        apply_jitter(x, params.jitter)
        _apply_to(x, params.gray, lambda images: images.copy_(rgb_to_luma(images).expand_as(images)))
        _apply_to(x, params.blurred, lambda images: blur(images, *weights))
        _apply_to(x, params.solarized, solarize)
        statistics = to_device_async(torch.tensor([self.views.mean, self.views.std]), x.device)
        mean, std = statistics.view(2, -1, 1, 1)
        return x.mul_(1 / std).sub_(mean / std)


def sample_jitter_params(keys: Tensor, config: JitterConfig) -> JitterParams:
    """Sample color jitter for views with keys (N,).

    Factors are uniform in [max(0, 1 - x), 1 + x], hue shifts in [-h, h], all orders equally likely.
    """
    draws = uniform(fold_in(keys, RNGStream.JITTER), 9)  # (N, 9)
    strength = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue])
    low, high = (1 - strength[:3]).clamp(min=0), 1 + strength[:3]
    active = strength.nonzero().squeeze(1)
    return JitterParams(
        applied=draws[:, 0] < config.p,
        order=active[draws[:, 5 + active].argsort(dim=1)],
        factor=low + (high - low) * draws[:, 1:4],
        hue=config.hue * (2 * draws[:, 4] - 1),
    )


def apply_jitter(x: Tensor, params: JitterParams) -> None:
    """Jitter n images (n, C, H, W) in [0, 1], each in its own order, in place.

    Values are clamped after each operation. Saturation and hue leave images of one channel unchanged.
    """
    color = x.shape[1] == 3
    for operations in params.order.where(params.applied[:, None], -1).unbind(dim=1):  # (n,)
        present = set(operations.tolist())
        for operation in sorted(present - {-1}):
            if operation >= _SATURATION and not color:
                continue
            amount = params.hue if operation == _HUE else params.factor[:, operation]  # (n,)
            if len(present) == 1:
                _OPERATIONS[operation](x, to_device_async(amount, x.device))
                continue
            indices = (operations == operation).nonzero().squeeze(1)
            amount, indices = (to_device_async(part, x.device) for part in (amount[indices], indices))
            images = x.index_select(0, indices)
            _OPERATIONS[operation](images, amount)
            x.index_copy_(0, indices, images)


def rgb_to_luma(x: Tensor) -> Tensor:
    """Return the luma (N, 1, H, W) of images (N, C, H, W) of three channels (ITU-R 601) or one."""
    if x.shape[1] == 1:
        return x
    red, green, blue = torch.split(x, 1, dim=1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def adjust_brightness(x: Tensor, factor: Tensor) -> None:
    """Scale images (N, C, H, W) by factors (N,), clamped to [0, 1]; in place."""
    x.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> None:
    """Scale the distance of images (N, C, H, W) to their mean luma by factors (N,), clamped to [0, 1]; in place."""
    factor = factor.view(-1, 1, 1, 1)
    mean = rgb_to_luma(x.mean(dim=(2, 3), keepdim=True))  # (N, 1, 1, 1)
    x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> None:
    """Scale the distance of images (N, 3, H, W) to their pixels' luma by factors (N,), clamped; in place."""
    factor = factor.view(-1, 1, 1, 1)
    gray = rgb_to_luma(x).mul_(1 - factor)  # (N, 1, H, W)
    x.mul_(factor).add_(gray).clamp_(0, 1)


def shift_hue(x: Tensor, shift: Tensor) -> None:
    """Shift the hues of RGB images (N, 3, H, W) in [0, 1] by `shift` (N,), a fraction of the color circle; in place.

    Minimum and chroma stay (Smith, SIGGRAPH 1978). Hues and their distances are in sixths of the circle, red at 0,
    green at 2, blue at 4. A channel is minimum + chroma * clamp(2 - d, 0, 1), where d is the distance of the hue to
    the channel's own; around the circle, for e in [-6, 6], 2 - d is abs(abs(e) - 3) - 1. No case distinction by the
    brightest channel is needed: with u = (red - minimum) / chroma and q = (green - blue) / chroma, one of u = 0, u = 1
    and abs(q) = 1 holds, and in all three the hue is u of the way from (3 - abs(q)) * sign(q) to q.
    """
    red, green, blue = x.unbind(dim=1)  # (N, H, W) each
    minimum = torch.minimum(red, green)
    torch.minimum(minimum, blue, out=minimum)
    chroma = torch.maximum(red, green)
    torch.maximum(chroma, blue, out=chroma).sub_(minimum).clamp_(min=_MIN_CHROMA)
    u = (red - minimum).div_(chroma)
    q = (green - blue).div_(chroma)
    opposite = torch.copysign(torch.tensor(3.0), q, out=red).sub_(q)
    hue = torch.lerp(opposite, q, u, out=q)  # (N, H, W), -3 to 3
    channel_hue = torch.arange(0, 6, 2, device=x.device) - 6 * shift[:, None]  # (N, 3), shifted the other way
    channel_hue.add_(3).remainder_(6).sub_(3)  # -3 to 3
    torch.sub(hue.unsqueeze(1), channel_hue[..., None, None], out=x)
    x.abs_().sub_(3).abs_().clamp_(1, 2)  # 1 more than the fraction of the chroma
    torch.addcmul(minimum.sub_(chroma).unsqueeze(1), x, chroma.unsqueeze(1), out=x)


_OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, shift_hue)


def solarize(x: Tensor) -> None:
    """Invert values of 128/255 and above in images in [0, 1], in place."""
    bright = F.threshold(x, _SOLARIZE_THRESHOLD, 0.5)  # elsewhere 1/2, which is its own inverse
    x.add_(bright.mul_(-2).add_(1))


def _apply_to(x: Tensor, mask: Tensor, transform: Callable[[Tensor], object]) -> None:
    """Apply an in-place transform to the images of (N, C, H, W) selected by a mask (N,) bool on the CPU."""
    indices = mask.nonzero().squeeze(1)
    if len(indices) == 0:
        return
    interval = slice(int(indices[0]), int(indices[-1]) + 1)
    if len(indices) == interval.stop - interval.start:
        transform(x[interval])
        return
    indices = to_device_async(indices, x.device)
    images = x.index_select(0, indices)
    transform(images)
    x.index_copy_(0, indices, images)


def _split_into_blocks(params: ColorParams, *, block_size: int) -> tuple[Tensor, list[slice]]:
    """Sort views by their order of jitter, the blurred ones last within each, and split these groups into blocks.

    Returns:
        The views' indices (N,) int64 in that order, and blocks of at most `block_size` views in it.
    """
    digits = 5 ** torch.arange(params.jitter.order.shape[1])
    code = (params.jitter.order + 1).where(params.jitter.applied[:, None], 0) @ digits  # (N,)
    order = (2 * code + params.blurred).argsort(stable=True)
    ends = [0, *code.bincount().cumsum(0).tolist()]
    groups = [range(start, end, block_size) for start, end in pairwise(ends)]
    return order, [slice(start, min(start + block_size, group.stop)) for group in groups for start in group]
