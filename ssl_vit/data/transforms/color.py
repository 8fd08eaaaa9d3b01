"""Color jitter, grayscale, blur, solarization and normalization of views, batched, each view with its own draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.config.methods import JitterConfig, ViewsConfig
from ssl_vit.data.transforms.separable_filter import BlurWeights, blur, blur_weights
from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.rng import RNGStream, fold_in, uniform, view_keys
from ssl_vit.runtime.workers import single_threaded

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_LUMA = (0.2989, 0.587, 0.114)
_SOLARIZE_ABOVE = 128 / 255 - 2.0**-24  # the float32 before 128/255
_LEAST_CHROMA = 1e-9  # for gray pixels, that no one divides by 0
_BLOCK = 1 << 19  # values that a CPU changes at once: of 2^14 to 2^20 the fastest with 1 MiB of cache per core


class JitterDraws(NamedTuple):
    """How n views are jittered, by those operations that are on."""

    chosen: Tensor  # (n,) bool: whether at all
    order: Tensor  # (n, operations) int64: which comes 1st, 2nd, ... of brightness 0, contrast 1, saturation 2, hue 3
    factor: Tensor  # (n, 3) of brightness, contrast and saturation
    hue: Tensor  # (n,) share of the color circle


class ColorParams(NamedTuple):
    """What n views undergo; on the CPU."""

    jitter: JitterDraws
    gray: Tensor  # (n,) bool
    blurred: Tensor  # (n,) bool
    sigma: Tensor  # (n,) pixels
    solarized: Tensor  # (n,) bool

    def of(self, views: Tensor | slice) -> ColorParams:
        """The draws of some of the views."""
        return ColorParams(JitterDraws(*(part[views] for part in self.jitter)), *(part[views] for part in self[1:]))


class ColorAugmentation:
    """The photometric half of the views, as in DINO: jitter, grayscale, blur, solarization, then normalization.

    What happens to a view follows from its sample's key and its number alone, not from the batch that it is in.
    Parameters are drawn on the CPU, the same for every device; give keys that are there, and the CPU never waits for
    a GPU. A GPU changes all views at once, a CPU those with the same order of jitter, as many as its cache holds.
    """

    def __init__(self, views: ViewsConfig) -> None:
        self.views = views

    def __call__(self, views: Tensor, key: Tensor, first_view: int = 0) -> Tensor:
        """Change and normalize views.

        Args:
            views: (B, V, C, H, W) uint8, of one or three channels.
            key: The samples' keys (B,) int64.
            first_view: Number of the first of the V views: 0 for global ones; for local ones the count of global ones.
                The numbers seed the draws, and choose between the probabilities for view 0, view 1 and all later ones.

        Returns:
            Views (B, V, C, H, W) float32, normalized.
        """
        batch, count, channels = views.shape[:3]
        keys = view_keys(key.cpu(), first_view, count).flatten()  # (N,), N = B*V
        kind = torch.arange(first_view, first_view + count).clamp(max=2).repeat(batch)  # (N,)
        draws = self._draw(keys, kind, color=channels == 3)
        flat = views.flatten(0, 1)  # (N, C, H, W)
        if views.device.type != "cpu":
            return self._change(flat, draws, self._blur_weights(flat, draws)).view(views.shape)

        with single_threaded():
            return self._by_blocks(flat, draws).view(views.shape)

    def _by_blocks(self, views: Tensor, draws: ColorParams) -> Tensor:
        """Change and normalize views (N, C, H, W), as many at once as the cache holds."""
        out = torch.empty(views.shape)
        places, blocks = _blocks(draws, most=max(1, _BLOCK // math.prod(views.shape[1:])))
        draws = draws.of(places)
        rows, cols = self._blur_weights(views, draws)
        done = 0  # of the blurred ones
        for block in blocks:
            some = draws.of(block)
            now = slice(done, done + int(some.blurred.sum()))
            changed = self._change(views.index_select(0, places[block]), some, (rows.of(now), cols.of(now)))
            for place, view in zip(places[block].tolist(), changed, strict=True):
                out[place] = view  # three times as fast as all of a block by their places
            done = now.stop
        return out

    def _draw(self, keys: Tensor, kind: Tensor, *, color: bool) -> ColorParams:
        """Decide for views with keys (N,), of kind (N,) 0, 1 or 2, what happens to them."""
        jitter, (low, high) = self.views.jitter, self.views.blur.sigma
        if not color:
            jitter = jitter.model_copy(update={"saturation": 0, "hue": 0})
        blur_draws = uniform(fold_in(keys, RNGStream.BLUR), 2)  # (N, 2)
        gray, solarized = (
            uniform(fold_in(keys, stream), 1)[:, 0] for stream in (RNGStream.GRAYSCALE, RNGStream.SOLARIZE)
        )
        return ColorParams(
            jitter=draw_jitter(keys, jitter),
            gray=gray < (self.views.grayscale if color else 0),
            blurred=blur_draws[:, 0] < torch.tensor(self.views.blur.p)[kind],
            sigma=low + (high - low) * blur_draws[:, 1],
            solarized=solarized < torch.tensor(self.views.solarize)[kind],
        )

    def _blur_weights(self, views: Tensor, draws: ColorParams) -> tuple[BlurWeights, BlurWeights]:
        """Weights for rows and columns of the blurred ones of views (N, C, H, W); cut off at 4 of the largest sigma."""
        sigma = to_device_async(draws.sigma[draws.blurred], views.device)
        reach = math.ceil(4 * self.views.blur.sigma[1])
        height, width = views.shape[2:]
        rows = blur_weights(sigma, size=height, reach=reach)
        return rows, rows if width == height else blur_weights(sigma, size=width, reach=reach)

    def _change(self, views: Tensor, draws: ColorParams, weights: tuple[BlurWeights, BlurWeights]) -> Tensor:
        """Views (n, C, H, W) uint8 as float32, changed and normalized."""
        x = views.contiguous().float().div_(255)
        jitter(x, draws.jitter)
        _change_some(x, draws.gray, lambda some: some.copy_(rgb_to_luma(some).expand_as(some)))
        _change_some(x, draws.blurred, lambda some: blur(some, *weights))
        _change_some(x, draws.solarized, solarize)
        statistics = to_device_async(torch.tensor([self.views.mean, self.views.std]), x.device)
        mean, std = statistics.view(2, -1, 1, 1)
        return x.mul_(1 / std).sub_(mean / std)


def draw_jitter(keys: Tensor, config: JitterConfig) -> JitterDraws:
    """Decide for views with keys (N,) whether, in which order and how far they are jittered.

    Factors are uniform in [max(0, 1 - x), 1 + x], hue shifts in [-h, h], all orders equally likely.
    """
    draws = uniform(fold_in(keys, RNGStream.JITTER), 9)  # (N, 9)
    most = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue])
    low, high = (1 - most[:3]).clamp(min=0), 1 + most[:3]
    on = most.nonzero().squeeze(1)
    return JitterDraws(
        chosen=draws[:, 0] < config.p,
        order=on[draws[:, 5 + on].argsort(dim=1)],
        factor=low + (high - low) * draws[:, 1:4],
        hue=config.hue * (2 * draws[:, 4] - 1),
    )


def jitter(x: Tensor, drawn: JitterDraws) -> None:
    """Jitter the chosen ones of n images (n, C, H, W) in [0, 1], each in its own order; in place.

    Values are clamped after each operation. One channel has no color: saturation and hue leave it as it is.
    """
    color = x.shape[1] == 3
    for operations in drawn.order.where(drawn.chosen[:, None], -1).unbind(dim=1):  # (n,)
        present = set(operations.tolist())
        for operation in sorted(present - {-1}):
            if operation >= _SATURATION and not color:
                continue
            amount = drawn.hue if operation == _HUE else drawn.factor[:, operation]  # (n,)
            if len(present) == 1:
                _OPERATIONS[operation](x, to_device_async(amount, x.device))
                continue
            places = (operations == operation).nonzero().squeeze(1)
            amount, places = (to_device_async(part, x.device) for part in (amount[places], places))
            some = x.index_select(0, places)
            _OPERATIONS[operation](some, amount)
            x.index_copy_(0, places, some)


def rgb_to_luma(x: Tensor) -> Tensor:
    """Brightness (N, 1, H, W) of images (N, C, H, W) of three channels (ITU-R 601) or one."""
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
    """Turn the colors of RGB images (N, 3, H, W) in [0, 1] by `shift` (N,), a share of the color circle; in place.

    Least value and chroma stay (Smith, SIGGRAPH 1978). Hues and their distances are in sixths of the circle, red at 0,
    green at 2, blue at 4. A channel is the least value + chroma * clamp(2 - d, 0, 1), where d is the distance of the
    hue from the channel's own; around the circle, for e in [-6, 6], 2 - d is abs(abs(e) - 3) - 1. There is no case for
    which channel is brightest: with u = (red - least) / chroma and q = (green - blue) / chroma, one of u = 0, u = 1
    and abs(q) = 1 holds, and in all three the hue lies u of the way from (3 - abs(q)) * sign(q) to q.
    """
    red, green, blue = x.unbind(dim=1)  # (N, H, W) each
    least = torch.minimum(red, green)
    torch.minimum(least, blue, out=least)
    chroma = torch.maximum(red, green)
    torch.maximum(chroma, blue, out=chroma).sub_(least).clamp_(min=_LEAST_CHROMA)
    u = (red - least).div_(chroma)
    q = (green - blue).div_(chroma)
    opposite = torch.copysign(torch.tensor(3.0), q, out=red).sub_(q)
    hue = torch.lerp(opposite, q, u, out=q)  # (N, H, W), -3 to 3
    own = torch.arange(0, 6, 2, device=x.device) - 6 * shift[:, None]  # (N, 3): of the channels, turned the other way
    own.add_(3).remainder_(6).sub_(3)  # -3 to 3
    torch.sub(hue.unsqueeze(1), own[..., None, None], out=x)
    x.abs_().sub_(3).abs_().clamp_(1, 2)  # 1 more than the share of the chroma
    torch.addcmul(least.sub_(chroma).unsqueeze(1), x, chroma.unsqueeze(1), out=x)


_OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, shift_hue)


def solarize(x: Tensor) -> None:
    """Invert the values of 128/255 and above, of images in [0, 1]; in place."""
    bright = F.threshold(x, _SOLARIZE_ABOVE, 0.5)  # where it is not: 1/2, its own inverse
    x.add_(bright.mul_(-2).add_(1))


def _change_some(x: Tensor, chosen: Tensor, change: Callable[[Tensor], object]) -> None:
    """Change some of the images (N, C, H, W), chosen (N,) bool on the CPU, in place by a function that does so."""
    places = chosen.nonzero().squeeze(1)
    if len(places) == 0:
        return
    run = slice(int(places[0]), int(places[-1]) + 1)
    if len(places) == run.stop - run.start:
        change(x[run])
        return
    places = to_device_async(places, x.device)
    some = x.index_select(0, places)
    change(some)
    x.index_copy_(0, places, some)


def _blocks(draws: ColorParams, *, most: int) -> tuple[Tensor, list[slice]]:
    """An order of views (N,) int64, and its runs of at most `most` views with the same order of jitter.

    In it, of those with the same order of jitter the blurred ones come last.
    """
    digits = 5 ** torch.arange(draws.jitter.order.shape[1])
    code = (draws.jitter.order + 1).where(draws.jitter.chosen[:, None], 0) @ digits  # (N,)
    places = (2 * code + draws.blurred).argsort(stable=True)
    ends = [0, *code.bincount().cumsum(0).tolist()]
    starts = [range(start, end, most) for start, end in pairwise(ends)]
    return places, [slice(at, min(at + most, some.stop)) for some in starts for at in some]
