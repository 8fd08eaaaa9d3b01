"""Weights for a backbone of another image size, number of channels, or more registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.errors import UserError

_SHAPE = ("name", "patch_size", "embed_dim", "depth", "num_heads")  # what a checkpoint decides


def adapt_backbone(source: Backbone, config: BackboneConfig) -> Backbone:
    """Return a trainable copy for another image size, number of channels, stochastic depth, or more registers.

    The position embeddings are resampled once, as timm does; the patch filters of `adapt_filters` see the new channels;
    new registers keep the values that they were drawn with, at positions of zeros.

    Raises:
        UserError: The configuration has another width, depth, number of heads or patch size, or fewer registers.
    """
    _check_shape(source.config, config)
    backbone = Backbone(config.model_copy(update={"img_size": source.config.img_size}))
    state, drawn = dict(source.vit.state_dict()), backbone.vit.state_dict()
    if config.in_chans != source.config.in_chans:
        state["patch_embed.proj.weight"] = adapt_filters(state["patch_embed.proj.weight"], config.in_chans)
    if new := config.reg_tokens - source.config.reg_tokens:
        old = [state["reg_token"]] if source.config.reg_tokens else []
        state["reg_token"] = torch.cat([*old, drawn["reg_token"][:, -new:]], dim=1)  # (1, R, D)
        if drawn["pos_embed"].shape[1] > state["pos_embed"].shape[1]:  # (1, prefix + N, D), the registers included
            prefix = source.num_prefix_tokens
            zeros = torch.zeros_like(drawn["reg_token"][:, -new:])
            state["pos_embed"] = torch.cat(
                [state["pos_embed"][:, :prefix], zeros, state["pos_embed"][:, prefix:]], dim=1
            )
    backbone.vit.load_state_dict(state)
    backbone.resize(config.img_size)
    return backbone


def adapt_filters(weight: Tensor, channels: int) -> Tensor:
    """Return patch filters (D, C', p, p) for C' channels from those (D, C, p, p) for C.

    For one channel the sum over C, so that a gray image gives what the same image with C equal channels gives. Else
    filter c is that of channel c mod C, times C / C', which keeps the size of the output (timm's `adapt_input_conv`,
    where C = 3).
    """
    given = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(channels) % given] * (given / channels)


def _check_shape(source: BackboneConfig, config: BackboneConfig) -> None:
    other = [
        f"backbone.{key}={getattr(config, key)}, where the checkpoint has {getattr(source, key)}"
        for key in _SHAPE
        if getattr(config, key) != getattr(source, key)
    ]
    if config.reg_tokens < source.reg_tokens:
        other.append(f"backbone.reg_tokens={config.reg_tokens}, where the checkpoint has {source.reg_tokens}")
    if other:
        raise UserError(
            f"{'; '.join(other)}: architecture and weights go together, so leave these keys out. Image size, channels, "
            "drop path and more registers may differ"
        )
