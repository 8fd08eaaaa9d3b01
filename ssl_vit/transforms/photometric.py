"""Colour jitter, grayscale, blur, solarization and normalisation of views, batched, each view with its own draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.config import JitterConfig, ViewsConfig
from ssl_vit.transforms.randomness import Stream, fold, uniform, view_keys
from ssl_vit.transforms.separable import apply, blur_weights

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_LUMA = (0.2989, 0.587, 0.114)
_SOLARIZE_FROM = 128 / 255


class JitterDraws(NamedTuple):
    """How n of N views are jittered."""

    chosen: Tensor  # (n,) int64, their places
    order: Tensor  # (n, 4) int64: which of brightness 0, contrast 1, saturation 2 and hue 3 comes first, second, ...
    factor: Tensor  # (n, 3) of brightness, contrast and saturation
    hue: Tensor  # (n,) share of the colour circle


class Photometric:
    """The photometric half of the views, as in DINO: jitter, grayscale, blur, solarization, then normalisation.

    What happens to a view follows from its sample's key and its number alone, not from the batch that it is in.
    Parameters are drawn on the CPU, the same for every device; give keys that are there, and the CPU never waits for
    a GPU.
    """

    def __init__(self, views: ViewsConfig) -> None:
        self.views = views

    def __call__(self, views: Tensor, key: Tensor, first_view: int = 0) -> Tensor:
        """Change and normalise views.

        Args:
            views: (B, V, C, H, W) uint8, of one or three channels.
            key: The samples' keys (B,) int64.
            first_view: Number of the first of the V views: 0 for global ones; for local ones the count of global ones.
                The numbers seed the draws, and choose between the probabilities for view 0, view 1 and all later ones.

        Returns:
            Views (B, V, C, H, W) float32, normalised.
        """
        batch, count = views.shape[:2]
        keys = view_keys(key.cpu(), first_view, count).flatten()  # (N,), N = B*V
        kind = torch.arange(first_view, first_view + count).clamp(max=2).repeat(batch)  # (N,)
        x = views.flatten(0, 1).float().div_(255)  # (N, C, H, W)
        self._jitter(x, keys)
        self._grayscale(x, keys)
        self._blur(x, keys, kind)
        self._solarize(x, keys, kind)
        statistics = torch.tensor([self.views.mean, self.views.std]).to(x.device, non_blocking=True)
        mean, std = statistics.view(2, -1, 1, 1)
        return x.sub_(mean).div_(std).view(views.shape)

    def _jitter(self, x: Tensor, keys: Tensor) -> None:
        """Change brightness, contrast, saturation and hue, in an order that each view draws for itself; in place."""
        drawn = draw_jitter(keys, self.views.jitter)
        chosen = drawn.chosen.to(x.device, non_blocking=True)
        picked = x[chosen]
        jitter(picked, drawn)
        x[chosen] = picked

    def _grayscale(self, x: Tensor, keys: Tensor) -> None:
        """Replace the channels by their luma; in place."""
        if x.shape[1] == 3:
            draws = uniform(fold(keys, Stream.GRAYSCALE), 1)[:, 0]
            chosen = _choose(draws, self.views.grayscale).to(x.device, non_blocking=True)
            x[chosen] = luma(x[chosen]).expand(-1, 3, -1, -1)

    def _blur(self, x: Tensor, keys: Tensor, kind: Tensor) -> None:
        """Gaussian blur with a sigma of its own for each view, cut off at four times the largest sigma; in place."""
        blur = self.views.blur
        low, high = blur.sigma
        draws = uniform(fold(keys, Stream.BLUR), 2)
        chosen = _choose(draws[:, 0], torch.tensor(blur.p)[kind])
        sigma = (low + (high - low) * draws[chosen, 1]).to(x.device, non_blocking=True)
        chosen = chosen.to(x.device, non_blocking=True)
        rows, cols = (blur_weights(sigma, size=size, reach=math.ceil(4 * high)) for size in x.shape[2:])
        x[chosen] = apply(x[chosen], rows, cols)

    def _solarize(self, x: Tensor, keys: Tensor, kind: Tensor) -> None:
        """Invert the bright half of the values; in place."""
        draws = uniform(fold(keys, Stream.SOLARIZE), 1)[:, 0]
        chosen = _choose(draws, torch.tensor(self.views.solarize)[kind]).to(x.device, non_blocking=True)
        x[chosen] = solarize(x[chosen])


def draw_jitter(keys: Tensor, config: JitterConfig) -> JitterDraws:
    """Decide for views with keys (N,) whether, in which order and how far they are jittered.

    Factors are uniform in [max(0, 1 - x), 1 + x], hue shifts in [-h, h], the 24 orders equally likely.
    """
    draws = uniform(fold(keys, Stream.JITTER), 9)  # (N, 9)
    chosen = _choose(draws[:, 0], config.p)
    draws = draws[chosen]
    strength = torch.tensor([config.brightness, config.contrast, config.saturation])
    low, high = (1 - strength).clamp(min=0), 1 + strength
    return JitterDraws(
        chosen=chosen,
        order=draws[:, 5:].argsort(dim=1),
        factor=low + (high - low) * draws[:, 1:4],
        hue=config.hue * (2 * draws[:, 4] - 1),
    )


def jitter(x: Tensor, drawn: JitterDraws) -> None:
    """Jitter each of n pictures (n, C, H, W) in [0, 1] in its own order; in place, clamped after each operation.

    One channel has no colour: saturation and hue leave it as it is.
    """
    colour = x.shape[1] == 3
    for operation in drawn.order.unbind(dim=1):  # (n,)
        _blend(x, operation, drawn.factor)
        turning = (operation == _HUE).nonzero().squeeze(1)
        if colour and drawn.hue.any():
            where = turning.to(x.device, non_blocking=True)
            x[where] = shift_hue(x[where], drawn.hue[turning].to(x.device, non_blocking=True))


def luma(x: Tensor) -> Tensor:
    """Brightness (N, 1, H, W) of pictures (N, C, H, W) of three channels (ITU-R 601) or one."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(dim=1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the colours of RGB pictures (N, 3, H, W) in [0, 1] by `shift` (N,), a share of the colour circle.

    Brightest value and chroma stay; with hue h in sixths of the circle, channel n = 5, 3, 1 of the result is
    max - chroma * clamp(min(k, 4 - k), 0, 1), where k = (n + h) mod 6 (Smith, SIGGRAPH 1978).
    """
    red, green, blue = x.unbind(dim=1)  # (N, H, W)
    top = x.amax(dim=1)
    chroma = top - x.amin(dim=1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(
        top == red,
        (green - blue) / safe,
        torch.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = hue + 6 * shift[:, None, None]  # (N, H, W)
    start = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = (start + sixths[:, None]).remainder_(6)  # (N, 3, H, W)
    return top[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def solarize(x: Tensor) -> Tensor:
    """Invert the values of 128/255 and above, of pictures in [0, 1]."""
    return torch.where(x >= _SOLARIZE_FROM, 1 - x, x)


def _choose(draws: Tensor, probability: Tensor | float) -> Tensor:
    """Places (n,) of the draws (N,) in [0, 1) that fall below the probability (N,) or ()."""
    return (draws < probability).nonzero().squeeze(1)


def _blend(x: Tensor, operation: Tensor, factor: Tensor) -> None:
    """Apply each picture's brightness, contrast or saturation, whichever `operation` says; in place.

    All three scale the distance to a reference: black, the mean luma of the picture, the luma of the pixel. One pass
    over the batch serves them; other operations get factor 1, which changes nothing.

    Args:
        x: Pictures (N, C, H, W) in [0, 1].
        operation: (N,) int64, on the CPU.
        factor: Factors (N, 3) of brightness, contrast and saturation, on the CPU.
    """
    changes = operation < (_SATURATION + 1 if x.shape[1] == 3 else _SATURATION)
    scale = torch.where(changes, factor.gather(1, operation.clamp(max=_SATURATION)[:, None]).squeeze(1), 1)
    to_mean, to_luma = (torch.where(operation == which, 1 - scale, 0) for which in (_CONTRAST, _SATURATION))
    table = torch.stack([scale, to_mean, to_luma]).to(x.device, non_blocking=True)
    scale, to_mean, to_luma = table[..., None, None, None]  # (N, 1, 1, 1) each
    grey = luma(x)
    pull = to_luma * grey + to_mean * grey.mean(dim=(1, 2, 3), keepdim=True)  # (N, 1, H, W)
    x.mul_(scale).add_(pull).clamp_(0, 1)
