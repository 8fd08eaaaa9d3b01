"""Collect attention statistics, token norms and features of images in forward passes of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.models.attention_maps import capture_qk, cls_attention_from_qk
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.analysis.attention_statistics import (
    HeadStatistics,
    attention_rollout,
    head_statistics,
    patch_centers,
)
from ssl_vit.visualization.analysis.feature_figures import TokenNorms, token_norms


class ExampleMaps(NamedTuple):
    """Maps of one image for figures."""

    crop: Tensor  # (C, S, S) uint8
    last: Tensor | None  # (rows, columns) [CLS] row of the last block, mean over the heads; None without class token
    rollout: Tensor | None  # (rows, columns)
    norms: Tensor  # (blocks, rows, columns) of the patch tokens after each block


class Activations(NamedTuple):
    """What was collected of n images."""

    heads: HeadStatistics  # (n, blocks, heads) each, and (n, blocks, heads, prefix)
    norms: TokenNorms  # (n, blocks, ...)
    features: Tensor  # (n, D) after the final norm: [CLS], or the mean of the patches without a class token
    examples: list[ExampleMaps]


class ActivationCollector:
    """Accumulator of the activations of a model, of image crops with side S in pixels (None: the model's own).

    Raises:
        UserError: The side is not a multiple of the patch, or a single patch.
    """

    def __init__(self, loaded: LoadedBackbone, image_size: int | None) -> None:
        self.backbone = loaded.backbone
        side, patch = image_size or self.backbone.config.img_size, self.backbone.patch_size
        if side % patch or side == patch:
            raise UserError(
                f"image_size={side}: {self.backbone.config.name} has patches of {patch} pixels; use a multiple of "
                f"that, {2 * patch} or more"
            )
        self.transform = EvalTransform(side, 1.0, loaded.mean, loaded.std)
        self.grid = side // patch, side // patch
        self.centers = patch_centers(self.grid, patch).to(self.backbone.device)
        self.num_blocks = self.backbone.num_blocks
        self._heads: list[list[HeadStatistics]] = [[] for _ in range(self.num_blocks)]
        self._norms: list[TokenNorms] = []
        self._features: list[Tensor] = []
        self._examples: list[ExampleMaps] = []

    @torch.no_grad()
    def update(self, crops: Tensor, *, num_examples: int) -> list[Tensor]:
        """Pass images (B, C, S, S) uint8 through the model; of the first ones also keep maps for figures.

        Return the mean patch tokens of the images after each block, (B, D) float32 on the CPU.

        Raises:
            UserError: A block does not compute the plain softmax(q k) attention.
        """
        prefix = self.backbone.num_prefix_tokens
        blocks: list[tuple[Tensor, Tensor]] = []  # queries and keys of the examples, if there is a class token

        def visit(block: int, queries: Tensor, keys: Tensor) -> None:
            self._heads[block].append(head_statistics(queries, keys, prefix=prefix, centers=self.centers))
            if self.backbone.has_cls and num_examples:
                blocks.append((queries[:num_examples].clone(), keys[:num_examples].clone()))

        with capture_qk(self.backbone, visit, blocks=range(self.num_blocks)):
            pixels = self.transform.normalize(crops.to(self.backbone.device))
            # (B, prefix + N, D) after the final norm; (B, N, D) after each block, before the final norm
            tokens, patches_of_blocks = self.backbone.get_patches_of_blocks(pixels)
        norms = torch.stack([patches.float().norm(dim=-1) for patches in patches_of_blocks], dim=1)  # (B, blocks, N)
        self._norms.append(token_norms(norms))
        features = tokens[:, 0] if self.backbone.has_cls else tokens[:, prefix:].mean(1)
        self._features.append(features.float().cpu().clone())  # not a view that keeps all tokens
        last = cls_attention_from_qk(self.backbone, *blocks[-1]).mean(1).cpu() if blocks else None
        rollouts = attention_rollout(blocks, prefix, self.grid) if blocks else None
        for index, crop in enumerate(crops[:num_examples]):
            last_map = None if last is None else last[index].view(self.grid)
            rollout = None if rollouts is None else rollouts[index]
            norm_maps = norms[index].view(self.num_blocks, *self.grid).cpu()
            self._examples.append(ExampleMaps(crop.clone(), last_map, rollout, norm_maps))
        return [patches.mean(1).float().cpu() for patches in patches_of_blocks]

    def compute(self) -> Activations:
        """Return the activations of all images so far."""
        by_block = [[torch.cat(parts) for parts in zip(*batches, strict=True)] for batches in self._heads]
        heads = HeadStatistics(*(torch.stack(parts, dim=1) for parts in zip(*by_block, strict=True)))
        norms = TokenNorms(*(torch.cat(parts) for parts in zip(*self._norms, strict=True)))
        return Activations(heads, norms, torch.cat(self._features), self._examples)
