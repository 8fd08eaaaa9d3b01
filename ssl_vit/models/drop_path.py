"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382) that an image's key decides, not the process's randomness."""

from __future__ import annotations

import torch
from timm.layers import DropPath as TimmDropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.rng import RNGStream, fold_in, uniform


class DropPath(nn.Module):
    """In training leaves a residual branch out for some images, and scales it up for the others.

    `sample_drop_paths` says for which, before every pass.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale = torch.ones(1)  # (B,): 0, or 1 / (1 - drop_prob)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        return x * self.scale[:, None, None].to(x.dtype) if self.training else x


def replace_drop_path(vit: VisionTransformer) -> list[DropPath]:
    """Put a `DropPath` in the place of each of timm's, with the same probability; two per block, in their order."""
    paths = []
    for block in vit.blocks:
        if isinstance(block.drop_path1, TimmDropPath):  # timm has none where the probability is 0
            block.drop_path1 = DropPath(block.drop_path1.drop_prob)
            block.drop_path2 = DropPath(block.drop_path2.drop_prob)
            paths += [block.drop_path1, block.drop_path2]
    return paths


def sample_drop_paths(paths: list[DropPath], key: Tensor | None, device: torch.device) -> None:
    """Draw for each image of the next training pass which branches it goes without.

    Args:
        paths: Of one model.
        key: The images' keys (B,) int64.
        device: Where the images are. The draws are made on the CPU, which does not wait for a GPU.

    Raises:
        ValueError: There is no key.
    """
    if key is None:
        raise ValueError("in training with drop_path above 0 the backbone needs the images' keys: forward(x, key)")
    draws = uniform(fold_in(key.cpu(), RNGStream.DROP_PATH), len(paths)).T  # (2 x blocks, B)
    drop_prob = torch.tensor([path.drop_prob for path in paths])[:, None]
    scales = to_device_async((draws >= drop_prob) / (1 - drop_prob), device)
    for path, scale in zip(paths, scales, strict=True):
        path.scale = scale
