"""What the [CLS] token looks at: the last block's softmax attention, read while fused attention stays on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from ssl_vit.errors import UserError
from ssl_vit.models.backbone import Backbone


@torch.no_grad()
def cls_attention(backbone: Backbone, images: Tensor) -> Tensor:
    """Attention of the [CLS] query over the patches, for each head of the last block.

    Queries and keys are caught on their way into the attention, so the forward pass itself keeps its fused kernel.
    The softmax runs over all tokens in float32, also under autocast; then the class token's and the registers' columns
    are dropped and the rest is scaled to sum 1 over the patches.

    Args:
        backbone: In evaluation mode.
        images: (B, C, H, W) float, normalised; H and W are multiples of the patch.

    Returns:
        (B, heads, rows, columns) float32; each map sums to 1.

    Raises:
        UserError: The last block does not compute the plain softmax(q k) attention.
    """
    attention = _plain_attention(backbone)
    with _outputs_of(attention.q_norm) as queries, _outputs_of(attention.k_norm) as keys:
        backbone.vit.forward_features(images)
    with torch.autocast(images.device.type, enabled=False):
        query = queries[0][:, :, :1].float()  # (B, heads, 1, d): the class token comes first
        logits = (query * attention.scale) @ keys[0].float().transpose(-2, -1)  # (B, heads, 1, tokens)
        weights: Tensor = logits.softmax(dim=-1).squeeze(2)
    patches = weights[..., backbone.vit.num_prefix_tokens :]
    patches = patches / patches.sum(dim=-1, keepdim=True)
    rows, columns = images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size
    return patches.view(*patches.shape[:2], rows, columns)


def fit_to_patches(picture: Tensor, patch: int, max_side: int | None = None) -> Tensor:
    """Resize a picture so that both sides are the nearest multiple of the patch (antialiased bicubic).

    Args:
        picture: (C, H, W) uint8 of any size and aspect.
        patch: Side of a patch in pixels.
        max_side: The longer side is first reduced to this many pixels, the aspect kept; None: never.

    Returns:
        (C, h, w) uint8.

    Raises:
        UserError: A side is smaller than one patch.
    """
    height, width = picture.shape[-2:]
    shrink = min(1.0, max_side / max(height, width)) if max_side else 1.0
    if min(height, width) * shrink < patch:
        reduced = f", reduced to max_side={max_side}" if shrink < 1 else ""
        raise UserError(f"{width} x {height} pixels{reduced}: a side is smaller than one patch of {patch} pixels")
    size = [round(side * shrink / patch) * patch for side in (height, width)]
    if size == [height, width]:
        return picture
    resized = F.interpolate(picture[None].float(), size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def _plain_attention(backbone: Backbone) -> Attention:
    modules = [module for module in backbone.vit.blocks[-1].modules() if type(module) is Attention]
    if len(modules) != 1:
        raise UserError(f"{backbone.config.name}: attention maps need a last block with one plain softmax attention")
    return modules[0]


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the module returns; nothing stays attached to it afterwards."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
