"""Each head of each block in a few numbers: how far it looks, how evenly, at which tokens, and how unlike the others.

A block's whole attention is never there at once: its rows are formed some at a time and reduced right away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.models.attention_maps import attention_weights

WEIGHTS = 2**22  # of attention that are formed at once: 16 MiB


class HeadStatistics(NamedTuple):
    """What one block's heads do in B images, by the rows of the patch queries."""

    distance: Tensor  # (B, heads) mean attention distance in pixels
    entropy: Tensor  # (B, heads) of the attention over the patches, between 0 and 1
    prefix: Tensor  # (B, heads, prefix tokens) attention that class token and registers receive
    diversity: Tensor  # (B, heads) 1 - mean cosine to the other heads' maps; NaN for a single head


def patch_centers(grid: tuple[int, int], patch: int) -> Tensor:
    """Where the patches of a grid (rows, columns) lie: (N, 2) in pixels, row by row."""
    rows, columns = (torch.arange(count, dtype=torch.float32) * patch for count in grid)
    return torch.cartesian_prod(rows, columns)


def uniform_distance(centers: Tensor) -> float:
    """The mean attention distance in pixels of attention that is the same everywhere; about 0.52 of a square's side."""
    return float(_distances(centers, centers).double().mean())


def head_statistics(queries: Tensor, keys: Tensor, *, prefix: int, centers: Tensor) -> HeadStatistics:
    """Reduce a block's attention to numbers per head.

    The softmax runs over all tokens, in float32. For all but `prefix` its rows are then restricted to the patches and
    scaled to sum 1: the distance (Dosovitskiy et al. 2021, arXiv 2010.11929, appendix D.7) is the mean over the patches
    i of Σ_j A_ij |p_i - p_j|, the entropy the mean of -Σ_j A_ij ln A_ij over ln N. Diversity compares the heads' whole
    patch-by-patch matrices, image by image.

    Args:
        queries: (B, heads, tokens, d), as they enter the softmax, not scaled.
        keys: Likewise.
        prefix: How many tokens come before the patches.
        centers: (N, 2) of the patches, in pixels; N of 2 and more.
    """
    batch, heads, _, _ = queries.shape
    count = len(centers)
    distance, entropy = queries.new_zeros(2, batch, heads, dtype=torch.float32)
    masses = queries.new_zeros(batch, heads, prefix, dtype=torch.float32)
    products = queries.new_zeros(batch, heads, heads, dtype=torch.float32)
    for rows, weights in attention_rows(queries[:, :, prefix:], keys):
        masses += weights[..., :prefix].sum(2)
        patches = weights[..., prefix:]  # (B, heads, M, N)
        patches = patches / patches.sum(-1, keepdim=True)
        distance += (patches * _distances(centers[rows], centers)).sum((-2, -1))
        entropy += torch.special.entr(patches).sum((-2, -1))
        flat = patches.flatten(2)
        products += flat @ flat.mT
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = products / (lengths[:, :, None] * lengths[:, None])
    others = (cosines.sum(-1) - 1) / (heads - 1) if heads > 1 else torch.full_like(distance, torch.nan)
    norm = torch.log(torch.tensor(float(count))).item() * count
    readings = HeadStatistics(distance / count, entropy / norm, masses / count, 1 - others)
    return HeadStatistics(*(part.cpu() for part in readings))


def attention_rows(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The attention (B, heads, M, tokens) of some queries (B, heads, N, d) after the other, with their places."""
    batch, heads, count, _ = queries.shape
    step = max(1, WEIGHTS // (batch * heads * keys.shape[2]))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        yield rows, attention_weights(queries[:, :, rows], keys)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
