"""Weights as they lie on model hubs: `model.safetensors`, and beside it timm's `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.backbone import check_plain_vit
from ssl_vit.models.export import ModelDescription
from ssl_vit.runtime.errors import UserError

_SIZES = ("img_size", "patch_size", "in_chans", "reg_tokens", "embed_dim", "depth", "num_heads")


def read_timm_config(path: Path) -> ModelDescription | None:
    """Return the architecture and normalization in timm's `config.json` beside weights; None without such a file.

    Raises:
        UserError: The file names a model that timm has not or that is no plain ViT, or changes more than its sizes.
    """
    try:
        content = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return None  # of another library
    name, changes = content["architecture"], content.get("model_args") or {}
    settings: dict[str, Any] = content | (content.get("pretrained_cfg") or {})
    origin = f"checkpoint={path}: config.json"
    if not timm.is_model(name):
        raise UserError(f"{origin} names {name}, which timm {timm.__version__} does not know")
    if unknown := sorted(changes.keys() - {*_SIZES, "global_pool", "num_classes", "dynamic_img_size"}):
        raise UserError(f"{origin} changes {', '.join(unknown)} of {name}, which is not supported")
    sizes = {key: value for key, value in changes.items() if key in _SIZES}
    with torch.device("meta"):
        plain = timm.create_model(name, num_classes=0, **sizes)
    check_plain_vit(plain, f"{origin}: {name}")
    channels, size = settings["input_size"][0], sizes.get("img_size", settings["input_size"][-1])
    config = BackboneConfig(
        name=name,
        img_size=size,
        patch_size=plain.patch_embed.patch_size[0],
        in_chans=sizes.get("in_chans", channels),
        reg_tokens=plain.num_reg_tokens,
        drop_path=0.0,
        **{key: sizes.get(key) for key in ("embed_dim", "depth", "num_heads")},
        init="timm",
    )
    return ModelDescription(backbone=config, mean=settings["mean"], std=settings["std"])
