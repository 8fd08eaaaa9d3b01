"""Self-attention as plain matrix products, for CPUs, with a backward pass that copies and keeps less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle


def set_attention_impl(attention: Attention, *, fused: bool) -> None:
    """Let timm's attention use torch's fused kernel, or `matmul_attention` if it has no extra parts; in place."""
    vars(attention).pop("forward", None)  # of an earlier call
    attention.fused_attn = fused
    if not fused and type(attention) is Attention and _has_no_extras(attention):
        attention.forward = partial(_forward, attention)


def _has_no_extras(attention: Attention) -> bool:
    extras = attention.q_norm, attention.k_norm, attention.norm
    dropouts = attention.attn_drop, attention.proj_drop
    return (
        all(type(part) is nn.Identity for part in extras)
        and all(dropout.p == 0 for dropout in dropouts)
        and attention.gate is None
    )


def _forward(attention: Attention, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).view(batch, tokens, 3, attention.num_heads, attention.head_dim)
    result: Tensor = attention.proj(matmul_attention(qkv, attention.scale))
    return result


def hook_qk(attention: Attention, visit: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call `visit` with the normalized queries and keys (B, heads, tokens, d) of every forward pass."""

    def split(_module: object, _inputs: object, output: Tensor) -> None:
        batch, tokens, _ = output.shape
        qkv = output.view(batch, tokens, 3, attention.num_heads, attention.head_dim)
        queries, keys, _ = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, heads, tokens, d) each
        visit(attention.q_norm(queries), attention.k_norm(keys))

    handle: RemovableHandle = attention.qkv.register_forward_hook(split)
    return handle


def matmul_attention(qkv: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale · q kᵀ) v of every head (Vaswani et al. 2017, equation 1).

    Args:
        qkv: Queries, keys and values (B, N, 3, H, d).
        scale: d^-1/2.

    Returns:
        (B, N, H·d), the heads concatenated.
    """
    result: Tensor = _Attend.apply(qkv, scale)
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:  # noqa: ANN401 - torch's, which takes any attribute
        batch, tokens, _, heads, width = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, tokens, width).unbind()  # (B·H, N, d) each
        with torch.autocast(qkv.device.type, enabled=False):  # on a GPU it would compute the softmax in float32
            weights = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale).softmax(dim=-1)  # (B·H, N, N)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shape = scale, qkv.shape
        return torch.bmm(weights, v).view(batch, heads, tokens, width).transpose(1, 2).reshape(batch, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        q, k, v, weights = ctx.saved_tensors
        batch, tokens, _, heads, width = ctx.shape
        grad = grad.view(batch, tokens, heads, width).transpose(1, 2).reshape(batch * heads, tokens, width)
        qkv_grad = grad.new_empty(3, *q.shape)
        scores_grad = torch._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype)
        torch.baddbmm(q, scores_grad, k, beta=0, alpha=ctx.scale, out=qkv_grad[0])
        torch.baddbmm(k, scores_grad.mT, q, beta=0, alpha=ctx.scale, out=qkv_grad[1])
        torch.bmm(weights.mT, grad, out=qkv_grad[2])
        return qkv_grad.view(3, batch, heads, tokens, width).permute(1, 3, 0, 2, 4).contiguous(), None
