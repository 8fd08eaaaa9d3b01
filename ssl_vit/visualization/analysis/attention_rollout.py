"""Attention rollout: what the class token draws on, followed back through all blocks and their residual branches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ssl_vit.visualization.analysis.head_statistics import attention_rows
from ssl_vit.visualization.image_grid import INK, PAPER, TitledFigure, fit_size, font, to_pil
from ssl_vit.visualization.overlays import blend_heatmap, resize_map

_SIDE = 330  # pixels of a tile's longer side
_GAP = 12


class Rollout:
    """Follows what B images' class tokens draw on back through the blocks, once all of these have been visited.

    Abnar & Zuidema 2020 (arXiv 2005.00928), section 3: with the mean over the heads A_l of block l, the residual branch
    makes it ½ (A_l + I), whose rows sum to 1 as they are, and the rollout is the product with the last block leftmost.
    Only its first row is wanted. That needs no product of matrices: the row goes from the last block to the first, and
    of the blocks their queries and keys are enough.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[Tensor, Tensor]] = []

    def visit(self, queries: Tensor, keys: Tensor) -> None:
        """Take the next block's queries and keys (B, heads, tokens, d)."""
        self._blocks.append((queries.clone(), keys.clone()))

    def cls_map(self, prefix: int, grid: tuple[int, int]) -> Tensor:
        """(B, rows, columns) on the CPU: the row of the class token over the patches, scaled to sum 1."""
        batch, heads, tokens, _ = self._blocks[0][0].shape
        row = self._blocks[0][0].new_zeros(batch, tokens, dtype=torch.float32)
        row[:, 0] = 1
        for queries, keys in reversed(self._blocks):
            passed = torch.zeros_like(row)
            for some, weights in attention_rows(queries, keys):  # (B, heads, M, tokens)
                passed += torch.einsum("bm,bhmt->bt", row[:, some], weights) / heads
            row = 0.5 * (passed + row)
        patches = row[:, prefix:]
        return (patches / patches.sum(-1, keepdim=True)).view(batch, *grid).cpu()


class Rolled(NamedTuple):
    """One image with what its class token draws on."""

    image: Tensor  # (C, H, W) uint8
    last: Tensor  # (rows, columns) the last block's [CLS] row, mean over the heads; sums to 1
    rollout: Tensor  # (rows, columns) sums to 1
    random: Tensor | None  # the rollout of the same model with random weights


def rollout_panel(rows: list[Rolled]) -> TitledFigure:
    """The images beside the last block's attention and the rollout, each column with one color scale."""
    columns: dict[str, list[Tensor]] = {
        "last block, heads' mean": [row.last for row in rows],
        "rollout, all blocks": [row.rollout for row in rows],
    }
    random = [row.random for row in rows if row.random is not None]
    if random:
        columns["rollout, random weights"] = random
    tops = [_top(maps) for maps in columns.values()]
    if random:  # flat beside the model's, not stretched until it looks like something
        tops[2] = max(tops[1:])
        tops[1] = tops[2]
    size = fit_size(rows[0].image, _SIDE)
    cell, header = (size[1] + _GAP, size[0] + _GAP), 72
    sheet = Image.new("RGB", ((len(columns) + 1) * cell[0] + _GAP, header + len(rows) * cell[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    captions = ["image", *(f"{name}\n0 to {top:.3g} x uniform" for name, top in zip(columns, tops, strict=True))]
    for place, caption in enumerate(captions):
        draw.multiline_text((_GAP + place * cell[0], 8), caption, INK, font=font(25))
    for line, row in enumerate(rows):
        upper = header + line * cell[1]
        sheet.paste(to_pil(row.image, size), (_GAP, upper))
        for place, (maps, top) in enumerate(zip(columns.values(), tops, strict=True)):
            heat = resize_map(maps[line], size) * maps[line].numel() / top
            sheet.paste(blend_heatmap(to_pil(row.image, size), heat.clip(0, 1)), (_GAP + (place + 1) * cell[0], upper))
    text = (
        "Bright is what the class token draws on: in the last block alone (mean over its heads), and through all "
        "blocks, with half of every step passing by in the residual branch (attention rollout, Abnar & Zuidema 2020). "
        "Rollout spreads with depth, and says nothing of classes. Columns of rollouts share one color scale; a map "
        "that is evenly colored is uniform attention."
    )
    if random:
        text += " What random weights show on the right is no knowledge."
    return TitledFigure("Attention rollout", sheet, text)


def _top(maps: list[Tensor]) -> float:
    """The upper end of a color scale for maps of one column, in multiples of uniform attention; 1.5 at least."""
    values = torch.stack(maps).flatten()
    return max(1.5, float(values.kthvalue(math.ceil(0.99 * len(values))).values) * maps[0].numel())
