"""DINO's own interpolation of position embeddings, so that its maps can be reproduced at any image size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ssl_vit.runtime.errors import UserError

_OFFSET = 0.1  # of patches, which DINO adds to rows and columns against rounding; it shifts the sampled grid


def use_official_positions(vit: VisionTransformer, origin: str) -> None:
    """Let a model interpolate its position embeddings as DINO's code does instead of timm's, in place.

    Raises:
        UserError: Its tokens are not those of DINO: one class token with a position, then a square grid of patches.
    """
    rows, columns = vit.patch_embed.grid_size
    if vit.pos_embed is None or vit.pos_embed.shape[1] != 1 + rows * columns or rows != columns or vit.num_reg_tokens:
        raise UserError(f"positions=official is for DINO's models, and the tokens of {origin} are others")

    def add_positions(patches: Tensor) -> Tensor:  # (B, rows, columns, D) -> (B, 1 + N, D)
        batch, height, width, _ = patches.shape
        tokens = torch.cat([vit.cls_token.expand(batch, -1, -1), patches.flatten(1, 2)], dim=1)
        added: Tensor = vit.pos_drop(tokens + interpolate_positions(vit.pos_embed, (height, width)))
        return added

    vit._pos_embed = add_positions


def interpolate_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate positions (1, 1 + N, D) to a grid of patches, bicubic without antialiasing (dino, commit 7c446df)."""
    side = math.isqrt(positions.shape[1] - 1)
    if grid == (side, side):
        return positions
    patches = positions[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    scales = [(count + _OFFSET) / side for count in grid]
    resized = F.interpolate(patches, scale_factor=scales, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([positions[:, :1], resized], dim=1)
