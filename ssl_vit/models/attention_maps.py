"""Attention maps, keys and patch tokens of a frozen model, extracted without turning fused attention off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.models.attention import hook_qk
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.errors import UserError

Visit = Callable[[int, Tensor, Tensor], None]  # block index, queries and keys (B, heads, tokens, d)


class LastBlockFeatures(NamedTuple):
    """Output of the last block for the patches of one image, in float32 on the CPU."""

    cls: Tensor | None  # (heads, rows, columns): attention of the [CLS] query, with sum 1; None without a class token
    keys: Tensor  # (heads, rows, columns, d)
    patches: Tensor  # (rows, columns, D), after the final norm


@torch.no_grad()
def extract_last_block(backbone: Backbone, images: Tensor) -> list[LastBlockFeatures]:
    """Extract the output of the last block for each image, in one forward pass.

    Args:
        backbone: In evaluation mode.
        images: (B, C, H, W) float, normalized; H and W are multiples of the patch.

    Raises:
        UserError: The last block does not compute the plain softmax(q k) attention, or its output is of no use.
    """
    captured: list[tuple[Tensor, Tensor]] = []
    with capture_qk(backbone, lambda _block, queries, keys: captured.append((queries, keys)), blocks=[-1]):
        tokens = backbone.tokens(images)  # (B, prefix + N, D)
    check_tokens(backbone, tokens)
    queries, keys = captured[0]
    grid = backbone.grid(images)
    maps = cls_attention_from_qk(backbone, queries, keys).cpu() if backbone.has_cls else None
    prefix = backbone.num_prefix_tokens
    patch_keys, patches = keys[:, :, prefix:].float().cpu(), tokens[:, prefix:].float().cpu()
    return [
        LastBlockFeatures(
            None if maps is None else maps[index].view(-1, *grid),
            patch_keys[index].reshape(-1, *grid, keys.shape[-1]),
            patches[index].reshape(*grid, -1),
        )
        for index in range(len(images))
    ]


@torch.no_grad()
def cls_attention(backbone: Backbone, images: Tensor, *, blocks: Sequence[int] = (-1,)) -> Tensor:
    """Compute the attention of the [CLS] query over the patches, for each head of some blocks.

    Args:
        backbone: In evaluation mode, with a class token.
        images: (B, C, H, W) float, normalized; H and W are multiples of the patch.
        blocks: Block indices; negative ones count from the end.

    Returns:
        (blocks, B, heads, rows, columns) float32; each map has sum 1.

    Raises:
        UserError: A block does not compute the plain softmax(q k) attention, or its output is of no use.
    """
    maps: list[Tensor] = []

    def visit(_block: int, queries: Tensor, keys: Tensor) -> None:
        maps.append(cls_attention_from_qk(backbone, queries, keys))

    with capture_qk(backbone, visit, blocks=blocks):
        check_tokens(backbone, backbone.tokens(images))
    stacked = torch.stack(maps)  # (blocks, B, heads, N)
    return stacked.view(*stacked.shape[:3], *backbone.grid(images))


def check_tokens(backbone: Backbone, tokens: Tensor) -> None:
    """Check that the tokens (B, prefix + N, D) of the last block are numbers, and not all zero.

    Raises:
        UserError: They are not, although the weights are finite: these are too large, or gone.
    """
    largest = tokens.abs().max()
    if not largest.isfinite():
        raise UserError(
            f"{backbone.config.name}: the model's features are not finite. Training has diverged: use an earlier "
            "checkpoint"
        )
    if largest == 0:
        raise UserError(f"{backbone.config.name}: the model's features are all zero. The model is damaged")


def cls_attention_from_qk(backbone: Backbone, queries: Tensor, keys: Tensor) -> Tensor:
    """Compute the attention (B, heads, N) of [CLS] over the patches from queries and keys (B, heads, tokens, d).

    In float32, also under autocast. It is the softmax over the patches alone, which equals their part of the softmax
    over all tokens, scaled to sum 1, and is defined even if that part is almost 0.
    """
    return attention_weights(queries[:, :, :1], keys[:, :, backbone.num_prefix_tokens :]).squeeze(2)


def attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Compute the attention (B, heads, M, N) in float32 of M queries (B, heads, M, d) over N keys (B, heads, N, d)."""
    with torch.autocast(queries.device.type, enabled=False):
        scaled = queries.float() * queries.shape[-1] ** -0.5
        weights: Tensor = (scaled @ keys.float().mT).softmax(dim=-1)
        return weights


@contextmanager
def capture_qk(backbone: Backbone, visit: Visit, *, blocks: Sequence[int]) -> Iterator[None]:
    """Call `visit` with the queries and keys of some blocks in every forward pass within the context.

    They are captured after the projection, so that the model still computes with its fused kernel.

    Args:
        backbone: The model.
        visit: Called in the order of the blocks with the block index, and queries and keys before scaling.
        blocks: Block indices; negative ones count from the end.

    Raises:
        UserError: One of them does not compute the plain softmax(q k) attention.
    """
    indices = sorted({block % backbone.num_blocks for block in blocks})
    attentions = [backbone.plain_attention(index) for index in indices]
    handles = [hook_qk(attention, partial(visit, index)) for index, attention in zip(indices, attentions, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def resize_to_patch_multiple(image: Tensor, patch: int, max_side: int | None = None) -> Tensor:
    """Resize an image so that both sides are the nearest multiple of the patch size (antialiased bicubic).

    Args:
        image: (C, H, W) uint8 of any size.
        patch: Patch size in pixels.
        max_side: Limit of the longer side in pixels, to which larger images are resized first; None: no limit.

    Returns:
        (C, h, w) uint8.

    Raises:
        UserError: A side is smaller than one patch.
    """
    height, width = image.shape[-2:]
    shrink = min(1.0, max_side / max(height, width)) if max_side else 1.0
    if min(height, width) * shrink < patch:
        reduced = f", reduced to max_side={max_side}" if shrink < 1 else ""
        raise UserError(f"{width} x {height} pixels{reduced}: a side is smaller than one patch of {patch} pixels")
    size = [round(side * shrink / patch) * patch for side in (height, width)]
    if size == [height, width]:
        return image
    resized = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def attention_mass_mask(maps: Tensor, mass: float) -> Tensor:
    """Select the fewest patches that together have a share `mass` of each map (DINO, Caron et al. 2021, figure 3).

    Patches are sorted in ascending order and kept from where their cumulative share exceeds 1 - mass.

    Args:
        maps: (..., rows, columns), non-negative.
        mass: Share of the attention to keep, between 0 and 1.

    Returns:
        (..., rows, columns) bool.

    >>> attention_mass_mask(torch.tensor([[0.1, 0.5], [0.3, 0.1]]), 0.6)
    tensor([[False,  True],
            [ True, False]])
    """
    values, order = maps.double().flatten(-2).sort(dim=-1, stable=True)
    cumulative = values.cumsum(dim=-1) / values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(cumulative > 0).scatter(-1, order, cumulative > 1 - mass).view(maps.shape)


def topk_mask(maps: Tensor, count: int) -> Tensor:
    """Select the `count` patches with the most attention of each map (..., rows, columns); ties in row order."""
    order = maps.flatten(-2).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(maps, dtype=torch.bool).flatten(-2).scatter(-1, order, True).view(maps.shape)


def patch_of_pixel(pixels: int, patches: int) -> Tensor:
    """Return the patch index (pixels,) int64 of each pixel of a side: the patch with the nearest center."""
    return ((torch.arange(pixels) + 0.5) * patches / pixels).long()


def upsample_mask(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample masks of patches (..., rows, columns) to an image's height and width: pixels get their patch's value."""
    rows, columns = masks.shape[-2:]
    return masks.index_select(-2, patch_of_pixel(size[0], rows)).index_select(-1, patch_of_pixel(size[1], columns))
