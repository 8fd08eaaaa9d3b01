"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382) sampled from keys of the images."""

from __future__ import annotations

import torch
from timm.layers import DropPath as TimmDropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_vit.runtime.device import to_device_async
from ssl_vit.runtime.rng import RNGStream, fold_in, uniform


class DropPath(nn.Module):
    """Skip of a residual branch for some images in training; for the others it is scaled up.

    `sample_drop_paths` chooses the images before every pass.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale = torch.ones(1)  # (B,): 0, or 1 / (1 - drop_prob)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        return x * self.scale[:, None, None].to(x.dtype) if self.training else x


def replace_drop_path(vit: VisionTransformer) -> list[DropPath]:
    """Replace each drop path of timm by a `DropPath` of the same probability; return them, two per block, in order."""
    paths = []
    for block in vit.blocks:
        if isinstance(block.drop_path1, TimmDropPath):  # timm has none where the probability is 0
            block.drop_path1 = DropPath(block.drop_path1.drop_prob)
            block.drop_path2 = DropPath(block.drop_path2.drop_prob)
            paths += [block.drop_path1, block.drop_path2]
    return paths


def sample_drop_paths(paths: list[DropPath], key: Tensor | None, device: torch.device) -> None:
    """Sample the branches of a model that each image skips in the next training pass, from sample keys (B,) int64.

    On the CPU, which does not wait for the `device` of the images.

    Raises:
        ValueError: The key is None.
    """
    if key is None:
        raise ValueError("drop_path above 0 needs the sample keys in training: forward(images, key)")
    samples = uniform(fold_in(key.cpu(), RNGStream.DROP_PATH), len(paths)).T  # (2 x blocks, B)
    drop_prob = torch.tensor([path.drop_prob for path in paths])[:, None]
    scales = to_device_async((samples >= drop_prob) / (1 - drop_prob), device)
    for path, scale in zip(paths, scales, strict=True):
        path.scale = scale
