"""One pass of pictures through a network, and everything of it that the panels need; no attention matrix is kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.attention.maps import cls_row, tapped
from ssl_vit.errors import UserError
from ssl_vit.inspection.heads import HeadReadings, patch_centres, read_heads
from ssl_vit.inspection.norms import TokenNorms, token_norms
from ssl_vit.inspection.rollout import Rollout
from ssl_vit.models.weights import LoadedBackbone
from ssl_vit.transforms.evaluation import EvalTransform


class Drawn(NamedTuple):
    """What a network sees in one of the pictures that are drawn."""

    crop: Tensor  # (C, S, S) uint8
    last: Tensor | None  # (rows, columns) [CLS] row of the last block, mean over the heads; None without class token
    rollout: Tensor | None  # (rows, columns)
    norms: Tensor  # (blocks, rows, columns) of the patch tokens behind each block


class Observation(NamedTuple):
    """What was seen of n pictures."""

    heads: HeadReadings  # (n, blocks, heads) each, and (n, blocks, heads, prefix)
    norms: TokenNorms  # (n, blocks, ...)
    features: Tensor  # (n, D) after the final norm: [CLS], or the patches' mean without one
    drawn: list[Drawn]


class Observer:
    """Watches a network while pictures pass through it.

    Args:
        loaded: The network, on its device.
        image_size: Side S of the pictures' crops, in pixels; None: the network's own.

    Raises:
        UserError: The side is no multiple of the patch, or a single patch.
    """

    def __init__(self, loaded: LoadedBackbone, image_size: int | None) -> None:
        self.backbone = loaded.backbone
        side, patch = image_size or self.backbone.config.img_size, self.backbone.patch_size
        if side % patch or side == patch:
            raise UserError(
                f"image_size={side}: {self.backbone.config.name} has patches of {patch} pixels; take a multiple of "
                f"that, {2 * patch} or more"
            )
        self.cut = EvalTransform(side, 1.0, loaded.mean, loaded.std)
        self.grid = side // patch, side // patch
        self.device = self.backbone.vit.patch_embed.proj.weight.device
        self.centres = patch_centres(self.grid, patch).to(self.device)
        self.depth = len(self.backbone.vit.blocks)
        self._heads: list[list[HeadReadings]] = [[] for _ in range(self.depth)]
        self._norms: list[TokenNorms] = []
        self._features: list[Tensor] = []
        self._drawn: list[Drawn] = []

    @torch.no_grad()
    def see(self, crops: Tensor, *, drawn: int) -> list[Tensor]:
        """Let pictures (B, C, S, S) uint8 through; of the first so many also keep what is drawn.

        Returns:
            For each block the pictures' mean patch tokens behind it, (B, D) float32 on the CPU.

        Raises:
            UserError: A block does not compute the plain softmax(q k) attention.
        """
        vit = self.backbone.vit
        prefix = vit.num_prefix_tokens
        rollout = Rollout()
        last: list[Tensor] = []

        def visit(block: int, queries: Tensor, keys: Tensor) -> None:
            self._heads[block].append(read_heads(queries, keys, prefix=prefix, centres=self.centres))
            if self.backbone.has_cls and drawn:
                rollout.visit(queries[:drawn], keys[:drawn])
                if block == self.depth - 1:
                    last.append(cls_row(self.backbone, queries[:drawn], keys[:drawn]).mean(1).cpu())

        with tapped(self.backbone, visit, blocks=range(self.depth)):
            tokens, between = vit.forward_intermediates(
                self.cut.normalise(crops.to(self.device)), output_fmt="NLC"
            )  # (B, prefix + N, D) after the final norm; (B, N, D) behind each block, before it
        norms = torch.stack([patches.float().norm(dim=-1) for patches in between], dim=1)  # (B, blocks, N)
        self._norms.append(token_norms(norms))
        features = tokens[:, 0] if self.backbone.has_cls else tokens[:, prefix:].mean(1)
        self._features.append(features.float().cpu())
        rolled = rollout.cls_map(prefix, self.grid) if last else None
        for place, crop in enumerate(crops[:drawn]):
            map_ = None if rolled is None else last[0][place].view(self.grid)
            maps = norms[place].view(self.depth, *self.grid).cpu()
            self._drawn.append(Drawn(crop, map_, None if rolled is None else rolled[place], maps))
        return [patches.mean(1).float().cpu() for patches in between]

    def observation(self) -> Observation:
        """Of all pictures so far."""
        by_block = [[torch.cat(parts) for parts in zip(*batches, strict=True)] for batches in self._heads]
        heads = HeadReadings(*(torch.stack(parts, dim=1) for parts in zip(*by_block, strict=True)))
        norms = TokenNorms(*(torch.cat(parts) for parts in zip(*self._norms, strict=True)))
        return Observation(heads, norms, torch.cat(self._features), self._drawn)
