"""Gaussian blur of a batch in which every image has its own sigma, as batched matrix products.

There is one weight matrix per image and axis. A blur reads few pixels for each one that it writes, so on the CPU its
matrices are cut into bands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BAND = 16  # pixels; on the CPU the fastest of 8, 16 and 32 for a reach of 8. A GPU takes the whole axis at once


class BlurWeights(NamedTuple):
    """The blur of each of B images along one axis, in bands of neighboring output pixels."""

    bands: list[tuple[int, int]]  # of each band: index into `weights`, and the first pixel that it reads
    weights: list[Tensor]  # (B, pixels, pixels read) each; bands away from the border share theirs

    def select(self, images: slice) -> BlurWeights:
        """Return the weights of some of the images."""
        return BlurWeights(self.bands, [weights[images] for weights in self.weights])


def blur_weights(sigma: Tensor, *, size: int, reach: int, radius: Tensor | None = None) -> BlurWeights:
    """Compute the weights of Gaussian blurs along an axis of `size` pixels, whose border pixels are repeated outside.

    The standard deviations `sigma` (B,) are in pixels; 0 changes nothing. The Gaussians are cut off `reach` pixels to
    either side, and each at its `radius` (B,), if given.
    """
    offset = torch.arange(-reach, reach + 1, device=sigma.device)  # (K,)
    kernel = torch.exp(-0.5 * offset**2 / sigma[:, None].square().clamp(min=1e-6))  # (B, K)
    if radius is not None:
        kernel *= offset.abs() <= radius[:, None]
    kernel /= kernel.sum(dim=1, keepdim=True)

    width = _BAND if sigma.device.type == "cpu" else size
    bands, kinds = [], dict[tuple[int, int, int], tuple[int, Tensor]]()
    for start in range(0, size, width):
        stop = min(start + width, size)
        first, end = max(start - reach, 0), min(stop + reach, size)
        kind = start - first, end - first, min(size - stop, reach)
        if kind not in kinds:
            pixel, read = (torch.arange(*ends, device=sigma.device) for ends in ((start, stop), (first, end)))
            source = (pixel + offset[:, None]).clamp(0, size - 1)  # (K, pixels): the pixel that each offset reads
            one_hot = (source[..., None] == read).to(kernel.dtype)  # (K, pixels, pixels read)
            with torch.autocast(sigma.device.type, enabled=False):
                kinds[kind] = len(kinds), (kernel @ one_hot.flatten(1)).view(len(sigma), *one_hot.shape[1:])
        bands.append((kinds[kind][0], first))
    return BlurWeights(bands, [weights for _, weights in kinds.values()])


def blur(x: Tensor, rows: BlurWeights, columns: BlurWeights) -> None:
    """Blur contiguous images (B, C, H, W) horizontally, then vertically, in place."""
    batch, channels, height, width = x.shape
    lines, planes = x.view(batch, channels * height, width), x.view(batch * channels, height, width)
    horizontal = torch.empty_like(x)
    horizontal_lines, horizontal_planes = horizontal.view_as(lines), horizontal.view_as(planes)
    across = [weights.mT for weights in columns.weights]  # (B, pixels read, pixels) each
    down = [weights.repeat_interleave(channels, dim=0) for weights in rows.weights]  # (B*C, pixels, pixels read)
    with torch.autocast(x.device.type, enabled=False):
        start = 0
        for kind, first in columns.bands:
            reads, pixels = across[kind].shape[1:]
            torch.bmm(lines.narrow(2, first, reads), across[kind], out=horizontal_lines.narrow(2, start, pixels))
            start += pixels
        start = 0
        for kind, first in rows.bands:
            pixels, reads = down[kind].shape[1:]
            torch.bmm(down[kind], horizontal_planes.narrow(1, first, reads), out=planes.narrow(1, start, pixels))
            start += pixels
