"""Linear operations on pictures that work row by row, then column by column: resampling and Gaussian blur.

Each is one small weight matrix per sample and axis, so that a batch in which every sample has its own crop, flip or
sigma is two batched matrix products, on the CPU and on a GPU alike.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply(x: Tensor, rows: Tensor, cols: Tensor, *, between: tuple[float, float] | None = None) -> Tensor:
    """Weight the columns, then the rows of each picture: rows @ x @ cols^T.

    Args:
        x: Pictures (B, C, H, W), float.
        rows: Weights (B, h, H) of the input rows in each output row.
        cols: Weights (B, w, W) of the input columns in each output column.
        between: Range to which values are clamped after the columns, as 8-bit resizers do; none by default.

    Returns:
        Pictures (B, C, h, w).
    """
    batch, channels, height, _ = x.shape
    width = cols.shape[1]
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 has fewer digits than a pixel
        wide = x.flatten(1, 2) @ cols.mT  # (B, C*H, w)
        if between is not None:
            wide = wide.clamp_(*between)
        return rows.unsqueeze(1) @ wide.view(batch, channels, height, width)


def resampling_weights(start: Tensor, length: Tensor, flip: Tensor, *, source: int, size: int) -> Tensor:
    """Weights (B, size, source) of bicubic, antialiased resampling of a stretch of each sample's axis.

    Keys' cubic convolution with a = -1/2, widened when shrinking, cut off at the stretch's ends and normalised there:
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


def blur_weights(sigma: Tensor, *, size: int, reach: int, radius: Tensor | None = None) -> Tensor:
    """Weights (B, size, size) of a Gaussian blur that goes on past the border with the border's own pixel.

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
    pixel = torch.arange(size, device=sigma.device)
    reads = (pixel + offset[:, None]).clamp(0, size - 1)  # (K, size): the pixel that each offset reads
    place = (reads[..., None] == pixel).to(kernel.dtype)  # (K, size, size)
    with torch.autocast(sigma.device.type, enabled=False):
        return (kernel @ place.flatten(1)).view(len(sigma), size, size)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel (1981), a = -1/2: 1 at 0, 0 at 1, and 0 from 2 on."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
