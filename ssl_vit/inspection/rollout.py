"""Attention rollout: what the class token draws on, followed back through all blocks and their residual branches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ssl_vit.attention.pictures import at_size, heat_over
from ssl_vit.evaluation.tiles import INK, PAPER, as_image, fitted, font
from ssl_vit.inspection.heads import attention_rows
from ssl_vit.inspection.panel import Panel

_SIDE = 330  # pixels of a tile's longer side
_GAP = 12


class Rollout:
    """The product of the blocks' attention so far: one tokens x tokens matrix for each of B pictures.

    Abnar & Zuidema 2020 (arXiv 2005.00928), section 3: with the mean over the heads A_l of block l, the residual branch
    makes it ½ (A_l + I), whose rows sum to 1 as they are, and the rollout is the product with the last block leftmost.
    """

    def __init__(self) -> None:
        self._product: Tensor | None = None

    def visit(self, queries: Tensor, keys: Tensor) -> None:
        """Go through the next block, given its queries and keys (B, heads, tokens, d)."""
        mixed = 0.5 * mean_attention(queries, keys)
        mixed.diagonal(dim1=-2, dim2=-1).add_(0.5)
        self._product = mixed if self._product is None else mixed @ self._product

    def cls_map(self, prefix: int, grid: tuple[int, int]) -> Tensor:
        """(B, rows, columns) on the CPU: the row of the class token over the patches, scaled to sum 1."""
        assert self._product is not None  # a network has blocks
        row = self._product[:, 0, prefix:]
        return (row / row.sum(-1, keepdim=True)).view(-1, *grid).cpu()


def mean_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """The heads' mean attention (B, tokens, tokens) in float32, from queries and keys (B, heads, tokens, d)."""
    return torch.cat([weights.mean(1) for _, weights in attention_rows(queries, keys)], dim=1)


class Rolled(NamedTuple):
    """One picture with what its class token draws on."""

    picture: Tensor  # (C, H, W) uint8
    last: Tensor  # (rows, columns) the last block's [CLS] row, mean over the heads; sums to 1
    rollout: Tensor  # (rows, columns) sums to 1
    random: Tensor | None  # the rollout of the same network with random weights


def rollout_panel(rows: list[Rolled]) -> Panel:
    """The pictures beside the last block's attention and the rollout, each column with one colour scale."""
    columns: dict[str, list[Tensor]] = {
        "last block, heads' mean": [row.last for row in rows],
        "rollout, all blocks": [row.rollout for row in rows],
    }
    random = [row.random for row in rows if row.random is not None]
    if random:
        columns["rollout, random weights"] = random
    tops = [_top(maps) for maps in columns.values()]
    if random:  # flat beside the network's, not stretched until it looks like something
        tops[2] = max(tops[1:])
        tops[1] = tops[2]
    size = fitted(rows[0].picture, _SIDE)
    cell, header = (size[1] + _GAP, size[0] + _GAP), 72
    sheet = Image.new("RGB", ((len(columns) + 1) * cell[0] + _GAP, header + len(rows) * cell[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    captions = ["picture", *(f"{name}\n0 to {top:.3g} x uniform" for name, top in zip(columns, tops, strict=True))]
    for place, caption in enumerate(captions):
        draw.multiline_text((_GAP + place * cell[0], 8), caption, INK, font=font(25))
    for line, row in enumerate(rows):
        upper = header + line * cell[1]
        sheet.paste(as_image(row.picture, size), (_GAP, upper))
        for place, (maps, top) in enumerate(zip(columns.values(), tops, strict=True)):
            heat = at_size(maps[line], size) * maps[line].numel() / top
            sheet.paste(heat_over(row.picture, heat.clip(0, 1)), (_GAP + (place + 1) * cell[0], upper))
    text = (
        "Bright is what the class token draws on: in the last block alone (mean over its heads), and through all "
        "blocks, with half of every step passing by in the residual branch (attention rollout, Abnar & Zuidema 2020). "
        "Rollout spreads with depth, and says nothing of classes. Columns of rollouts share one colour scale; a map "
        "that is evenly coloured is uniform attention."
    )
    if random:
        text += " What random weights show on the right is no knowledge."
    return Panel("Attention rollout", sheet, text)


def _top(maps: list[Tensor]) -> float:
    """The upper end of a colour scale for maps of one column, in multiples of uniform attention; 1.5 at least."""
    values = torch.stack(maps).flatten()
    return max(1.5, float(values.kthvalue(math.ceil(0.998 * len(values))).values) * maps[0].numel())
