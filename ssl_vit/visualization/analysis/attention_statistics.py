"""Statistics of each attention head (distance, entropy, diversity, attention on prefix tokens), and attention rollout.

The full attention of a block is never in memory: some of its rows at a time are computed and reduced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.models.attention_maps import attention_weights

MAX_WEIGHTS = 2**22  # attention weights in memory at a time: 16 MiB


class HeadStatistics(NamedTuple):
    """Statistics of the heads of one block in B images, over the rows of the patch queries."""

    distance: Tensor  # (B, heads) mean attention distance in pixels
    entropy: Tensor  # (B, heads) of the attention over the patches, between 0 and 1
    prefix: Tensor  # (B, heads, prefix tokens) attention on class token and registers
    diversity: Tensor  # (B, heads) 1 - mean cosine to the maps of the other heads; NaN for a single head


def patch_centers(grid: tuple[int, int], patch: int) -> Tensor:
    """Return the positions (N, 2) of the patches of a grid (rows, columns) in pixels, row by row."""
    rows, columns = (torch.arange(count, dtype=torch.float32) * patch for count in grid)
    return torch.cartesian_prod(rows, columns)


def uniform_distance(centers: Tensor) -> float:
    """Return the mean attention distance in pixels of uniform attention, about 0.52 of the side of a square."""
    return float(_distances(centers, centers).double().mean())


def head_statistics(queries: Tensor, keys: Tensor, *, prefix: int, centers: Tensor) -> HeadStatistics:
    """Compute the statistics of each head of a block from queries and keys (B, heads, tokens, d), not scaled.

    The softmax runs over all tokens, in float32. For all statistics but `prefix` its rows are then restricted to the
    patches and scaled to sum 1: the distance (Dosovitskiy et al. 2021, arXiv 2010.11929, appendix D.7) is the mean over
    the patches i of Σ_j A_ij |p_i - p_j|, the entropy the mean of -Σ_j A_ij ln A_ij over ln N. Diversity compares the
    whole patch-by-patch matrices of the heads, image by image. `prefix` tokens precede the patches, of which there are
    two or more, at `centers` (N, 2) in pixels.
    """
    batch, heads, _, _ = queries.shape
    count = len(centers)
    distance, entropy = queries.new_zeros(2, batch, heads, dtype=torch.float32)
    prefix_sum = queries.new_zeros(batch, heads, prefix, dtype=torch.float32)
    products = queries.new_zeros(batch, heads, heads, dtype=torch.float32)
    for rows, weights in attention_rows(queries[:, :, prefix:], keys):
        prefix_sum += weights[..., :prefix].sum(2)
        patches = weights[..., prefix:]  # (B, heads, M, N)
        patches = patches / patches.sum(-1, keepdim=True)
        distance += (patches * _distances(centers[rows], centers)).sum((-2, -1))
        entropy += torch.special.entr(patches).sum((-2, -1))
        flat = patches.flatten(2)
        products += flat @ flat.mT
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = products / (lengths[:, :, None] * lengths[:, None])
    similarity = (cosines.sum(-1) - 1) / (heads - 1) if heads > 1 else torch.full_like(distance, torch.nan)
    norm = torch.log(torch.tensor(float(count))).item() * count
    statistics = HeadStatistics(distance / count, entropy / norm, prefix_sum / count, 1 - similarity)
    return HeadStatistics(*(part.cpu() for part in statistics))


def attention_rows(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the attention (B, heads, M, tokens) of slices of the queries (B, heads, N, d), with the slices."""
    batch, heads, count, _ = queries.shape
    step = max(1, MAX_WEIGHTS // (batch * heads * keys.shape[2]))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        yield rows, attention_weights(queries[:, :, rows], keys)


def attention_rollout(blocks: list[tuple[Tensor, Tensor]], prefix: int, grid: tuple[int, int]) -> Tensor:
    """Compute the rollout (B, rows, columns) of the class tokens over the patches, scaled to sum 1, on the CPU.

    Abnar & Zuidema 2020 (arXiv 2005.00928), section 3: with the mean over the heads A_l of block l, the residual branch
    makes it ½ (A_l + I), whose rows still sum to 1, and the rollout is the product with the last block leftmost. Only
    its first row is needed, so no product of matrices is: the row is propagated from the last block to the first, from
    the queries and keys (B, heads, tokens, d) of each block.
    """
    batch, heads, tokens, _ = blocks[0][0].shape
    row = blocks[0][0].new_zeros(batch, tokens, dtype=torch.float32)
    row[:, 0] = 1
    for queries, keys in reversed(blocks):
        attended = torch.zeros_like(row)
        for part, weights in attention_rows(queries, keys):  # (B, heads, M, tokens)
            attended += torch.einsum("bm,bhmt->bt", row[:, part], weights) / heads
        row = 0.5 * (attended + row)
    patches = row[:, prefix:]
    return (patches / patches.sum(-1, keepdim=True)).view(batch, *grid).cpu()


def rollout_scale_max(maps: list[Tensor]) -> float:
    """Return the 99 % quantile of maps in multiples of uniform attention, at least 1.5: the end of a color scale."""
    values = torch.stack(maps).flatten()
    return max(1.5, float(values.kthvalue(math.ceil(0.99 * len(values))).values) * maps[0].numel())


def _distances(one: Tensor, other: Tensor) -> Tensor:
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
