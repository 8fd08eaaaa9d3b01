"""One pass of images through a model, and everything of it that the panels need; no attention matrix is kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.models.attention_maps import capture_qk, cls_attention_from_qk
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.analysis.attention_rollout import Rollout
from ssl_vit.visualization.analysis.head_statistics import HeadStatistics, head_statistics, patch_centers
from ssl_vit.visualization.analysis.token_norms import TokenNorms, token_norms


class ExampleMaps(NamedTuple):
    """What a model sees in one of the images that are drawn."""

    crop: Tensor  # (C, S, S) uint8
    last: Tensor | None  # (rows, columns) [CLS] row of the last block, mean over the heads; None without class token
    rollout: Tensor | None  # (rows, columns)
    norms: Tensor  # (blocks, rows, columns) of the patch tokens behind each block


class Observation(NamedTuple):
    """What was seen of n images."""

    heads: HeadStatistics  # (n, blocks, heads) each, and (n, blocks, heads, prefix)
    norms: TokenNorms  # (n, blocks, ...)
    features: Tensor  # (n, D) after the final norm: [CLS], or the patches' mean without one
    drawn: list[ExampleMaps]


class Observer:
    """Watches a model while images pass through it.

    Args:
        loaded: The model, on its device.
        image_size: Side S of the images' crops, in pixels; None: the model's own.

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
        self.device = self.backbone.device
        self.centers = patch_centers(self.grid, patch).to(self.device)
        self.depth = self.backbone.num_blocks
        self._heads: list[list[HeadStatistics]] = [[] for _ in range(self.depth)]
        self._norms: list[TokenNorms] = []
        self._features: list[Tensor] = []
        self._drawn: list[ExampleMaps] = []

    @torch.no_grad()
    def see(self, crops: Tensor, *, drawn: int) -> list[Tensor]:
        """Let images (B, C, S, S) uint8 through; of the first so many also keep what is drawn.

        Returns:
            For each block the images' mean patch tokens behind it, (B, D) float32 on the CPU.

        Raises:
            UserError: A block does not compute the plain softmax(q k) attention.
        """
        prefix = self.backbone.num_prefix_tokens
        rollout = Rollout()
        last: list[Tensor] = []

        def visit(block: int, queries: Tensor, keys: Tensor) -> None:
            self._heads[block].append(head_statistics(queries, keys, prefix=prefix, centers=self.centers))
            if self.backbone.has_cls and drawn:
                rollout.visit(queries[:drawn], keys[:drawn])
                if block == self.depth - 1:
                    last.append(cls_attention_from_qk(self.backbone, queries[:drawn], keys[:drawn]).mean(1).cpu())

        with capture_qk(self.backbone, visit, blocks=range(self.depth)):
            # (B, prefix + N, D) after the final norm; (B, N, D) behind each block, before it
            tokens, between = self.backbone.get_patches_of_blocks(self.cut.normalize(crops.to(self.device)))
        norms = torch.stack([patches.float().norm(dim=-1) for patches in between], dim=1)  # (B, blocks, N)
        self._norms.append(token_norms(norms))
        features = tokens[:, 0] if self.backbone.has_cls else tokens[:, prefix:].mean(1)
        self._features.append(features.float().cpu().clone())  # not a view that keeps all tokens
        rolled = rollout.cls_map(prefix, self.grid) if last else None
        for place, crop in enumerate(crops[:drawn]):
            map_ = None if rolled is None else last[0][place].view(self.grid)
            maps = norms[place].view(self.depth, *self.grid).cpu()
            self._drawn.append(ExampleMaps(crop.clone(), map_, None if rolled is None else rolled[place], maps))
        return [patches.mean(1).float().cpu() for patches in between]

    def observation(self) -> Observation:
        """Of all images so far."""
        by_block = [[torch.cat(parts) for parts in zip(*batches, strict=True)] for batches in self._heads]
        heads = HeadStatistics(*(torch.stack(parts, dim=1) for parts in zip(*by_block, strict=True)))
        norms = TokenNorms(*(torch.cat(parts) for parts in zip(*self._norms, strict=True)))
        return Observation(heads, norms, torch.cat(self._features), self._drawn)
