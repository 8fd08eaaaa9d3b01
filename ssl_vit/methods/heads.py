"""Heads of the backbone that are used in pretraining only."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_vit.config.methods import DINOHeadConfig
from ssl_vit.losses.dino import FactoredLogits
from ssl_vit.runtime.device import upcast


class Prototypes(nn.Module):
    """Weight-normalized linear layer without bias: logits (B, K) = z (B, D) · (g v/‖v‖)ᵀ, not yet multiplied out.

    The parameters keep the official names and shapes, weight_g (K, 1) and weight_v (K, D), and torch's default
    initialization of a linear layer for v. With `norm_last_layer` g stays at 1 and the logits of unit vectors are
    cosines.
    """

    def __init__(self, dim: int, prototypes: int, *, norm_last_layer: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(dim, prototypes, bias=False).weight.detach())  # (K, D)
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_last_layer)  # (K, 1)

    def forward(self, z: Tensor) -> FactoredLogits:  # (B, D) -> (B, K)
        device = z.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else z.dtype
        return FactoredLogits(z.to(dtype), *_Directions.apply(self.weight_v, self.weight_g, dtype))


class _Directions(torch.autograd.Function):
    """Cast v (K, D) to another dtype, and compute the scale g / ‖v‖ (K,) that gives each row the norm g (K, 1).

    Equal to autograd's result, but with two passes over v's gradient: v may have more weights than the backbone.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        length = torch.linalg.vector_norm(v, dim=1)  # (K,)
        ctx.save_for_backward(v, g, length)
        # A copy: with FSDP the weights are complete only until the end of the model's forward pass.
        return v.to(dtype, copy=True), g.squeeze(1) / length

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cast_grad: Tensor, scale_grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        v, g, length = ctx.saved_tensors
        g_grad = scale_grad / length  # (K,)
        v_grad = cast_grad.to(v.dtype, copy=True).addcmul_(v, -(g_grad * g.squeeze(1) / length**2)[:, None])
        return v_grad, g_grad[:, None], None


class DINOHead(nn.Module):
    """DINO's head: MLP, L2 normalization, prototypes (`vision_transformer.DINOHead` without batch norm).

    Names and shapes are the official ones: mlp.{0,2,4}.{weight,bias}, last_layer.weight_g, last_layer.weight_v.
    """

    def __init__(self, embed_dim: int, config: DINOHeadConfig) -> None:
        super().__init__()
        self.mlp = mlp([embed_dim, *[config.hidden_dim] * (config.layers - 1), config.bottleneck_dim])
        self.last_layer = Prototypes(config.bottleneck_dim, config.prototypes, norm_last_layer=config.norm_last_layer)

    def forward(self, cls: Tensor) -> FactoredLogits:  # (B, D) -> (B, K)
        bottleneck = upcast(self.mlp(cls))  # in bfloat16 the norm would be off by up to 0.3 %
        logits: FactoredLogits = self.last_layer(F.normalize(bottleneck, dim=-1))
        return logits


def mlp(dims: list[int]) -> nn.Sequential:
    """Build linear layers of widths `dims` with GELU between them; weights are truncated normal (.02), biases 0."""
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(dims):
        linear = nn.Linear(inner, outer)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1])


class ReconstructionHead(nn.Module):
    """Head from patch tokens to pixels: a transposed convolution with kernel and stride of a patch (SiT v1)."""

    def __init__(self, embed_dim: int, patch_size: int, in_chans: int) -> None:
        super().__init__()
        self.deconvolution = nn.ConvTranspose2d(embed_dim, in_chans, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # (B, N, D) -> (B, C, H, W)
        images: Tensor = self.deconvolution(patches.transpose(1, 2).reshape(len(patches), -1, *grid))
        return images
