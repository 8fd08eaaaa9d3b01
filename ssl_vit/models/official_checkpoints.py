"""Conversion of official DINO and SiT v1 checkpoints to timm's parameter names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.runtime.errors import UserError

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

# Besides the backbone a file may contain DINO's head, a classifier, or SiT's heads and loss weights.
_NOT_BACKBONE = (
    "head.",
    "projection_head.",
    "rot_head.",
    "contrastive_head.",
    "convTrans.",
    "pre_logits_rot.",
    "pre_logits_contrastive.",
    "rot_w",
    "contrastive_w",
    "recons_w",
)


def convert_official_checkpoint(
    content: dict[str, Any], weights: str, origin: str
) -> tuple[BackboneConfig, dict[str, Tensor], str]:
    """Return the architecture, inferred from shapes; the weights under timm's names; and which model they are.

    DINO: a full checkpoint (`teacher`, `student`) or a flat backbone. SiT v1: `model`, or flat. Prefixes `module.` and
    `backbone.` are removed.

    Raises:
        UserError: The keys are not those of a ViT.
    """
    nested = next((key for key in (weights, "model", "state_dict") if isinstance(content.get(key), dict)), None)
    state = content[nested] if nested else content
    state = {
        key.removeprefix("module.").removeprefix("backbone."): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    state = {key: value for key, value in state.items() if not key.startswith(_NOT_BACKBONE)}
    if "contrastive_token" in state:
        state = _sit_to_timm(state)
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        found = ", ".join(list(content)[:6]) or "nothing"
        raise UserError(f"{origin}: not a checkpoint of ssl-vit, nor a DINO or SiT file; its keys: {found}")
    return _architecture(state, origin), state, nested or "backbone"


def _sit_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reorder SiT's tokens [rotation, contrastive, patches] to timm's [class, register, patches]."""
    state = dict(state)
    position = state.pop("pos_embed")  # (1, 2 + N, D)
    state["pos_embed"] = torch.cat([position[:, 1:2], position[:, 0:1], position[:, 2:]], dim=1)
    state["cls_token"] = state.pop("contrastive_token")  # (1, 1, D)
    state["reg_token"] = state.pop("rot_token")  # (1, 1, D)
    return state


def _architecture(state: dict[str, Tensor], origin: str) -> BackboneConfig:
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    side = math.isqrt(state["pos_embed"].shape[1] - 1 - registers)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if width % 64:
        raise UserError(f"{origin}: width {width} is not a multiple of 64, the width of an attention head in DINO")
    return BackboneConfig(
        name="vit_tiny_patch16_224",
        img_size=side * patch,
        patch_size=patch,
        in_chans=channels,
        reg_tokens=registers,
        drop_path=0.0,
        embed_dim=width,
        depth=depth,
        num_heads=width // 64,
        init="timm",
    )
