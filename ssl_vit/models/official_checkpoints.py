"""Conversion of official DINO and SiT v1 checkpoints to timm's parameter names."""

from __future__ import annotations

import argparse
import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.runtime.errors import UserError

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
HEAD_WIDTH = 64  # of the attention heads of DINO and SiT

# In full checkpoints of DINO: the arguments, and the learning rate and weight decay as NumPy scalars, whose module has
# another name since NumPy 2. None of these runs code when it is read.
OFFICIAL_CLASSES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
    *((np.float64(0).__reduce__()[0], f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
]

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
    content: dict[str, Any], weights: str, path: Path, num_heads: int | None
) -> tuple[BackboneConfig, dict[str, Tensor], str]:
    """Return the architecture, inferred from shapes; the weights under timm's names; and which model they are.

    DINO: a full checkpoint (`teacher`, `student`) or a flat backbone. SiT v1: `model`, or flat. Prefixes `module.` and
    `backbone.` are removed. Shapes do not tell the number of attention heads: without `num_heads` it is that of DINO
    and SiT (heads of width 64), for files that are known to be theirs.

    Raises:
        UserError: The keys are not those of a ViT, or it is not known how many heads it has.
    """
    origin = f"checkpoint={path}"
    nested = next((key for key in (weights, "model", "state_dict") if isinstance(content.get(key), dict)), None)
    state = content[nested] if nested else content
    state = {
        key.removeprefix("module.").removeprefix("backbone."): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    state = {key: value for key, value in state.items() if not key.startswith(_NOT_BACKBONE)}
    is_sit = "contrastive_token" in state
    if is_sit:
        state = _sit_to_timm(state)
    foreign = _name_foreign_file(content, state)
    if foreign or not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        found = foreign or _list_keys(content, state)
        raise UserError(f"{origin}: not a checkpoint of ssl-vit, nor a DINO or SiT file; {found}")
    width = state["patch_embed.proj.weight"].shape[0]
    if num_heads is None:
        num_heads = max(1, width // HEAD_WIDTH)
        if width % HEAD_WIDTH or not (is_sit or _is_dino(content, path)):
            raise UserError(
                f"{origin}: the file does not tell how many attention heads the model has (in DINO, DeiT and MAE "
                f"{num_heads} for width {width}; in MoCo v3's ViT-S 12). Export it once with the number, and use the "
                f"exported file: ssl-vit export checkpoint={path} num_heads={num_heads} out=backbone.safetensors"
            )
    elif width % num_heads:
        raise UserError(f"{origin}: num_heads={num_heads} does not divide the width {width}")
    return _architecture(state, num_heads, origin), state, nested or "backbone"


def _list_keys(content: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Return the first keys of a file that is not understood, and of the weights in it."""
    keys = f"its keys: {', '.join(map(str, list(content)[:6])) or 'nothing'}"
    inner = next((key for key, value in content.items() if isinstance(value, dict) and value), None)
    if state and not content.keys() & state.keys():
        return f"{keys}; those of the weights: {', '.join(list(state)[:3])}"
    return keys if inner is None else f"{keys}; if {inner} contains the weights, save it alone"


def _is_dino(content: dict[str, Any], path: Path) -> bool:
    """Return whether a file is a full checkpoint of DINO's training, or has the name of a published file."""
    return {"teacher", "student", "args"} <= content.keys() or re.match(r"dino(?!v\d)", path.name) is not None


def _name_foreign_file(content: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Return what a file of another tool is and what to do with it; empty if it is not known."""
    keys = state.keys()
    if any(key.startswith("decoder_") for key in keys):
        return "it is a full MAE checkpoint: save its encoder without mask_token and decoder, or use timm:<model>.mae"
    if "storage_tokens" in keys or any("rope_embed" in key for key in keys):
        return "it is a DINOv3 file, with rotary position embeddings, which are not supported yet"
    if any(key.endswith("ls1.gamma") for key in keys) and "mask_token" in keys:
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        size = {384: "small", 768: "base", 1024: "large", 1536: "giant"}.get(width, "small")
        return f"it is a DINOv2 file of width {width}: use timm's copy, timm:vit_{size}_patch{patch}_dinov2.lvd142m"
    if any(re.match(r"blocks\.\d+\.\d+\.", key) for key in keys):
        return "it is a checkpoint of DINOv2's training, whose blocks are in chunks, which is not supported"
    if any(key.startswith(("embeddings.", "vit.embeddings.", "encoder.layer.")) for key in keys):
        return "it has the names of the transformers library: use timm's copy of the model, timm:<model>"
    if any(key.startswith(("base_encoder.", "momentum_encoder.")) for key in keys):
        return "it is a MoCo v3 checkpoint: save the keys below module.base_encoder. without this prefix"
    if "pytorch-lightning_version" in content:
        return (
            "it is a Lightning checkpoint of another tool: save the weights of its backbone alone, under timm's names"
        )
    if any(key.startswith("_orig_mod.") for key in keys):
        return "it is a compiled model: save the keys without the prefix _orig_mod."
    return ""


def _sit_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reorder SiT's tokens [rotation, contrastive, patches] to timm's [class, register, patches]."""
    state = dict(state)
    position = state.pop("pos_embed")  # (1, 2 + N, D)
    state["pos_embed"] = torch.cat([position[:, 1:2], position[:, 0:1], position[:, 2:]], dim=1)
    state["cls_token"] = state.pop("contrastive_token")  # (1, 1, D)
    state["reg_token"] = state.pop("rot_token")  # (1, 1, D)
    return state


def _architecture(state: dict[str, Tensor], num_heads: int, origin: str) -> BackboneConfig:
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    count = state["pos_embed"].shape[1] - 1 - registers
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"{origin}: {count} position embeddings of patches are no square grid, which is not supported")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    return BackboneConfig(
        name="vit_tiny_patch16_224",
        img_size=side * patch,
        patch_size=patch,
        in_chans=channels,
        reg_tokens=registers,
        drop_path=0.0,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        init="timm",
    )


def torch_load_weights_only(path: Path) -> dict[str, Any]:
    """Load a torch file of plain containers, tensors and numbers.

    Raises:
        UserError: The file is damaged or contains anything else, which could run code.
    """
    refused = UserError(
        f"{path} is damaged or not a checkpoint of plain tensors; anything else is not read, as it could run code"
    )
    try:
        official = torch.serialization.safe_globals(OFFICIAL_CLASSES)
        if zipfile.is_zipfile(path):  # with a CRC-32 of each record, which torch does not check
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise refused
        with warnings.catch_warnings(action="ignore"), official:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # depending on the damage, torch raises anything
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program, which is not read: save its state_dict") from None
        if found := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            raise UserError(
                f"{path} contains {found[1]}, which is not read, as it could run code; save a dict of its tensors alone"
            ) from None
        raise refused from None
    if not isinstance(content, dict):
        raise refused
    return content
