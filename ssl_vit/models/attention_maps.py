"""What a frozen model sees in images: attention, keys and patch tokens, read while fused attention stays on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor

from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.errors import UserError

Visit = Callable[[int, Tensor, Tensor], None]  # block, then its queries and keys (B, heads, tokens, d)


class LastBlockFeatures(NamedTuple):
    """What the last block makes of one image, patch by patch; all in float32 on the CPU."""

    cls: Tensor | None  # (heads, rows, columns): attention of the [CLS] query, sums to 1; None without a class token
    keys: Tensor  # (heads, rows, columns, d)
    patches: Tensor  # (rows, columns, D), after the final norm


@torch.no_grad()
def extract_last_block(backbone: Backbone, images: Tensor) -> list[LastBlockFeatures]:
    """What the last block makes of each image, from one forward pass.

    Args:
        backbone: In evaluation mode.
        images: (B, C, H, W) float, normalized; H and W are multiples of the patch.

    Raises:
        UserError: The last block does not compute the plain softmax(q k) attention.
    """
    caught: list[tuple[Tensor, Tensor]] = []
    with capture_qk(backbone, lambda _block, queries, keys: caught.append((queries, keys)), blocks=[-1]):
        tokens = backbone.tokens(images)  # (B, prefix + N, D)
    queries, keys = caught[0]
    grid = images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size
    maps = cls_attention_from_qk(backbone, queries, keys).cpu() if backbone.has_cls else None
    prefix = backbone.num_prefix_tokens
    of_patches, patches = keys[:, :, prefix:].float().cpu(), tokens[:, prefix:].float().cpu()
    return [
        LastBlockFeatures(
            None if maps is None else maps[place].view(-1, *grid),
            of_patches[place].reshape(-1, *grid, keys.shape[-1]),
            patches[place].reshape(*grid, -1),
        )
        for place in range(len(images))
    ]


@torch.no_grad()
def cls_attention(backbone: Backbone, images: Tensor, *, blocks: Sequence[int] = (-1,)) -> Tensor:
    """Attention of the [CLS] query over the patches, for each head of some blocks.

    Args:
        backbone: In evaluation mode, with a class token.
        images: (B, C, H, W) float, normalized; H and W are multiples of the patch.
        blocks: Their numbers from 0; negative ones count from the end.

    Returns:
        (blocks, B, heads, rows, columns) float32; each map sums to 1.

    Raises:
        UserError: A block does not compute the plain softmax(q k) attention.
    """
    maps: list[Tensor] = []
    with capture_qk(
        backbone,
        lambda _block, queries, keys: maps.append(cls_attention_from_qk(backbone, queries, keys)),
        blocks=blocks,
    ):
        backbone.tokens(images)
    grid = images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size
    stacked = torch.stack(maps)  # (blocks, B, heads, N)
    return stacked.view(*stacked.shape[:3], *grid)


def cls_attention_from_qk(backbone: Backbone, queries: Tensor, keys: Tensor) -> Tensor:
    """Attention (B, heads, N) of [CLS] over the patches, from a block's queries and keys (B, heads, tokens, d).

    In float32, also under autocast. It is what the softmax over all tokens leaves to the patches, scaled to sum 1; that
    is their own softmax, which has a value even where next to nothing is left to them.
    """
    return attention_weights(queries[:, :, :1], keys[:, :, backbone.num_prefix_tokens :]).squeeze(2)


def attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention (B, heads, M, N) in float32 of M queries (B, heads, M, d) over N keys (B, heads, N, d)."""
    with torch.autocast(queries.device.type, enabled=False):
        scaled = queries.float() * queries.shape[-1] ** -0.5
        weights: Tensor = (scaled @ keys.float().mT).softmax(dim=-1)
        return weights


@contextmanager
def capture_qk(backbone: Backbone, visit: Visit, *, blocks: Sequence[int]) -> Iterator[None]:
    """Within it, every forward pass hands the queries and keys of some blocks to `visit`, in the order of the blocks.

    They are caught where they leave the projection, so that the model computes as ever: with its fused kernel.

    Args:
        backbone: Nothing stays attached to it afterwards.
        visit: Is given the block's number from 0; queries and keys are as they enter the softmax, but not scaled.
        blocks: Their numbers from 0; negative ones count from the end.

    Raises:
        UserError: One of them does not compute the plain softmax(q k) attention.
    """
    depth = backbone.num_blocks
    numbers = sorted({block % depth for block in blocks})
    attentions = [_plain_attention(backbone, block) for block in numbers]
    handles = [
        attention.qkv.register_forward_hook(partial(_split_and_visit, attention, partial(visit, block)))
        for block, attention in zip(numbers, attentions, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split_and_visit(
    attention: Attention, visit: Callable[[Tensor, Tensor], None], _module: object, _inputs: object, output: Tensor
) -> None:
    batch, tokens, _ = output.shape
    split = output.view(batch, tokens, 3, attention.num_heads, attention.head_dim)
    queries, keys, _ = split.permute(2, 0, 3, 1, 4).unbind()  # (B, heads, tokens, d) each
    visit(attention.q_norm(queries), attention.k_norm(keys))


def resize_to_patch_multiple(image: Tensor, patch: int, max_side: int | None = None) -> Tensor:
    """Resize an image so that both sides are the nearest multiple of the patch (antialiased bicubic).

    Args:
        image: (C, H, W) uint8 of any size and aspect.
        patch: Side of a patch in pixels.
        max_side: The longer side is first reduced to this many pixels, the aspect kept; None: never.

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


def _plain_attention(backbone: Backbone, block: int) -> Attention:
    modules = [module for module in backbone.vit.blocks[block].modules() if type(module) is Attention]
    if len(modules) != 1:
        raise UserError(f"{backbone.config.name}: attention maps need blocks with one plain softmax attention each")
    return modules[0]


def attention_mass_mask(maps: Tensor, mass: float) -> Tensor:
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


def topk_mask(maps: Tensor, count: int) -> Tensor:
    """The `count` patches with the most attention of each map (..., rows, columns), as bool; ties go row by row."""
    order = maps.flatten(-2).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(maps, dtype=torch.bool).flatten(-2).scatter(-1, order, True).view(maps.shape)


def patch_of_pixel(pixels: int, patches: int) -> Tensor:
    """Which patch (pixels,) int64 each pixel of a side belongs to: the one whose center is nearest."""
    return ((torch.arange(pixels) + 0.5) * patches / pixels).long()


def upsample_mask(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of patches (..., rows, columns) at an image's own height and width: each pixel takes its patch's value."""
    rows, columns = masks.shape[-2:]
    return masks.index_select(-2, patch_of_pixel(size[0], rows)).index_select(-1, patch_of_pixel(size[1], columns))
