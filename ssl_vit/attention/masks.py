"""From a soft attention map to a hard mask of patches, and from patches to pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def mass_mask(maps: Tensor, mass: float) -> Tensor:
    """The fewest patches that together hold `mass` of each map (DINO, Caron et al. 2021, figure 3).

    The patches are sorted ascending and kept from where their cumulative share exceeds 1 - mass.

    Args:
        maps: (..., rows, columns), not negative.
        mass: Share of the attention to keep, between 0 and 1.

    Returns:
        (..., rows, columns) bool.

    >>> mass_mask(torch.tensor([[0.1, 0.5], [0.3, 0.1]]), 0.6)
    tensor([[False,  True],
            [ True, False]])
    """
    values, order = maps.double().flatten(-2).sort(dim=-1, stable=True)
    cumulative = values.cumsum(dim=-1) / values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(cumulative > 0).scatter(-1, order, cumulative > 1 - mass).view(maps.shape)


def top_mask(maps: Tensor, count: int) -> Tensor:
    """The `count` patches with the most attention of each map (..., rows, columns), as bool; ties go row by row."""
    order = maps.flatten(-2).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(maps, dtype=torch.bool).flatten(-2).scatter(-1, order, True).view(maps.shape)


def patch_of_pixel(pixels: int, patches: int) -> Tensor:
    """Which patch (pixels,) int64 each pixel of a side belongs to: the one whose centre is nearest."""
    return ((torch.arange(pixels) + 0.5) * patches / pixels).long()


def to_pixels(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of patches (..., rows, columns) at a picture's own height and width: each pixel takes its patch's value."""
    rows, columns = masks.shape[-2:]
    return masks.index_select(-2, patch_of_pixel(size[0], rows)).index_select(-1, patch_of_pixel(size[1], columns))
