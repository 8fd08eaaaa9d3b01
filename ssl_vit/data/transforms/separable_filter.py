"""Linear operations on images that work row by row, then column by column: resampling and Gaussian blur.

Each is one small weight matrix per sample and axis, so that a batch in which every sample has its own crop, flip or
sigma is two batched matrix products, on the CPU and on a GPU alike. A blur reads few pixels for each one it writes: on
the CPU its matrices are cut into bands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BAND = 16  # pixels; on the CPU the fastest of 8, 16 and 32 with a reach of 8. A GPU takes the whole axis at once


def separable_filter(x: Tensor, rows: Tensor, cols: Tensor, *, between: tuple[float, float] | None = None) -> Tensor:
    """Weight the columns, then the rows of each image: rows @ x @ cols^T.

    Args:
        x: Images (B, C, H, W), float.
        rows: Weights (B, h, H) of the input rows in each output row.
        cols: Weights (B, w, W) of the input columns in each output column.
        between: Range to which values are clamped after the columns, as 8-bit resizers do; none by default.

    Returns:
        Images (B, C, h, w).
    """
    batch, channels, height, _ = x.shape
    width = cols.shape[1]
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 has fewer digits than a pixel
        wide = x.flatten(1, 2) @ cols.mT  # (B, C*H, w)
        if between is not None:
            wide = wide.clamp_(*between)
        return rows.unsqueeze(1) @ wide.view(batch, channels, height, width)


def bicubic_weights(start: Tensor, length: Tensor, flip: Tensor, *, source: int, size: int) -> Tensor:
    """Weights (B, size, source) of bicubic, antialiased resampling of a stretch of each sample's axis.

    Keys' cubic convolution with a = -1/2, widened when shrinking, cut off at the stretch's ends and normalized there:
    what Pillow and torchvision do to a crop.

    Args:
        start: First pixel of the stretch (B,).
        length: Pixels in the stretch (B,).
        flip: Whether the output runs backwards (B,), bool.
        source: Pixels of the input axis.
        size: Pixels of the output axis.
    """
    start, length, flip = (each[:, None, None] for each in (start, length, flip))  # (B, 1, 1)
    step = length / size
    out = torch.arange(size, device=start.device)[:, None]  # (size, 1)
    center = start + (torch.where(flip, size - 1 - out, out) + 0.5) * step  # (B, size, 1)
    pixel = torch.arange(source, device=start.device)  # (source,)
    weight = _cubic((pixel + 0.5 - center) / step.clamp(min=1))  # (B, size, source)
    weight *= (pixel >= start) & (pixel < start + length)
    return weight.div_(weight.sum(dim=-1, keepdim=True))


class BlurWeights(NamedTuple):
    """A Gaussian blur of each of B samples along an axis, in bands of neighboring output pixels."""

    bands: list[tuple[int, int]]  # of each band: which of the weights, and the first pixel that it reads
    weights: list[Tensor]  # (B, pixels, pixels read) each; bands away from the border share theirs

    def of(self, samples: slice) -> BlurWeights:
        """The weights of some of the samples."""
        return BlurWeights(self.bands, [weights[samples] for weights in self.weights])


def blur_weights(sigma: Tensor, *, size: int, reach: int, radius: Tensor | None = None) -> BlurWeights:
    """Weights of a Gaussian blur that goes on past the border with the border's own pixel.

    Args:
        sigma: Standard deviation in pixels (B,); 0 changes nothing.
        size: Pixels of the axis.
        reach: Pixels to either side after which the Gaussian is cut off, for all samples.
        radius: The same per sample (B,), at most `reach`.
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
            reads = (pixel + offset[:, None]).clamp(0, size - 1)  # (K, pixels): the pixel that each offset reads
            place = (reads[..., None] == read).to(kernel.dtype)  # (K, pixels, pixels read)
            with torch.autocast(sigma.device.type, enabled=False):
                kinds[kind] = len(kinds), (kernel @ place.flatten(1)).view(len(sigma), *place.shape[1:])
        bands.append((kinds[kind][0], first))
    return BlurWeights(bands, [weights for _, weights in kinds.values()])


def blur(x: Tensor, rows: BlurWeights, cols: BlurWeights) -> None:
    """Blur the columns, then the rows of contiguous images (B, C, H, W), weights for H and for W pixels; in place."""
    batch, channels, height, width = x.shape
    lines, planes = x.view(batch, channels * height, width), x.view(batch * channels, height, width)
    wide = torch.empty_like(x)
    wide_lines, wide_planes = wide.view_as(lines), wide.view_as(planes)
    across = [weights.mT for weights in cols.weights]  # (B, pixels read, pixels) each
    down = [weights.repeat_interleave(channels, dim=0) for weights in rows.weights]  # (B*C, pixels, pixels read)
    with torch.autocast(x.device.type, enabled=False):
        at = 0
        for kind, first in cols.bands:
            reads, pixels = across[kind].shape[1:]
            read = lines.narrow(2, first, reads)
            torch.bmm(read, across[kind], out=wide_lines.narrow(2, at, pixels))
            at += pixels
        at = 0
        for kind, first in rows.bands:
            pixels, reads = down[kind].shape[1:]
            torch.bmm(down[kind], wide_planes.narrow(1, first, reads), out=planes.narrow(1, at, pixels))
            at += pixels


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel (1981), a = -1/2: 1 at 0, 0 at 1, and 0 from 2 on."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
