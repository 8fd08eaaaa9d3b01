"""Conversion of official DINO, iBOT, DINOv2, MAE and SiT v1 checkpoints to timm's parameter names."""

from __future__ import annotations

import argparse
import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.runtime.errors import UserError

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
HEAD_WIDTH = 64  # of the attention heads of DINO, iBOT, DINOv2, SiT, and MAE's ViT-B and ViT-L
LICENSES = {"MAE": "weights for non-commercial use (CC-BY-NC 4.0)"}
HEADS = {("MAE", 1280): 16}  # where they are wider, by family and width

# In full checkpoints of DINO: the arguments, and the learning rate and weight decay as NumPy scalars, whose module has
# another name since NumPy 2. None of these runs code when it is read.
OFFICIAL_CLASSES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
    *((np.float64(0).__reduce__()[0], f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
]

# Besides the backbone a file may contain heads of DINO, iBOT and DINOv2, a classifier, a mask token, MAE's decoder, or
# SiT's heads and loss weights.
_NOT_BACKBONE = (
    "dino_head.",
    "ibot_head.",
    "masked_embed",
    "mask_token",
    "decoder_",
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


class OfficialFile(NamedTuple):
    """A backbone as another project's training wrote it."""

    family: str  # DINO, iBOT, DINOv2, MAE or SiT
    config: BackboneConfig  # inferred from shapes
    state: dict[str, Tensor]  # under timm's names
    which: str  # teacher, student, or the key of a file that holds one model


def convert_official_checkpoint(
    content: dict[str, Any], weights: str, path: Path, num_heads: int | None
) -> OfficialFile:
    """Convert the content of an official file.

    DINO, iBOT and DINOv2: a full checkpoint (`teacher`, `student`) or a flat backbone; blocks of DINOv2 may be in
    chunks. MAE: with its decoder, which is left out, or the encoder alone. SiT v1: `model`, or flat. Prefixes `module.`
    and `backbone.` are removed. Shapes do not tell the number of attention heads: without `num_heads` it is that of the
    family, for files that are known to be of one.

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
    family = _family(content, state, path)
    state = {key: value for key, value in state.items() if not key.startswith(_NOT_BACKBONE)}
    if family == "SiT":
        state = _sit_to_timm(state)
    if family == "DINOv2":
        state = _dinov2_to_timm(state)
    foreign = _name_foreign_file(content, state)
    if foreign or not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        found = foreign or _list_keys(content, state)
        raise UserError(f"{origin}: not a checkpoint of ssl-vit, nor a DINO, iBOT, DINOv2, MAE or SiT file; {found}")
    width = state["patch_embed.proj.weight"].shape[0]
    if num_heads is None:
        num_heads = HEADS.get((family, width), max(1, width // HEAD_WIDTH))
        if width % HEAD_WIDTH or not family:
            raise UserError(
                f"{origin}: the file does not tell how many attention heads the model has (in DINO, DeiT and MAE "
                f"{num_heads} for width {width}; in MoCo v3's ViT-S 12). Export it once with the number, and use the "
                f"exported file: ssl-vit export checkpoint={path} num_heads={num_heads} out=backbone.safetensors"
            )
    elif width % num_heads:
        raise UserError(f"{origin}: num_heads={num_heads} does not divide the width {width}")
    return OfficialFile(family or "DINO", _architecture(state, num_heads, origin), state, nested or "backbone")


def _list_keys(content: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Return the first keys of a file that is not understood, and of the weights in it."""
    keys = f"its keys: {', '.join(map(str, list(content)[:6])) or 'nothing'}"
    inner = next((key for key, value in content.items() if isinstance(value, dict) and value), None)
    if state and not content.keys() & state.keys():
        return f"{keys}; those of the weights: {', '.join(list(state)[:3])}"
    return keys if inner is None else f"{keys}; if {inner} contains the weights, save it alone"


def _family(content: dict[str, Any], state: dict[str, Tensor], path: Path) -> str:
    """Return whose file it is by keys that others have not, or, for DINO, by its name; empty if that is not known."""
    if "contrastive_token" in state:
        return "SiT"
    if any(key.endswith("ls1.gamma") for key in state) and {"mask_token", "register_tokens"} & state.keys():
        return "DINOv2"
    if "masked_embed" in state:
        return "iBOT"
    if any(key.startswith("decoder_") for key in state) or re.match(r"mae_", path.name):
        return "MAE"
    return "DINO" if {"teacher", "student", "args"} <= content.keys() or re.match(r"dino(?!v\d)", path.name) else ""


def _dinov2_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename blocks in chunks and gated MLPs; with registers, add the position of [CLS] to its token, as timm does."""
    names = {key: re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key) for key in state}
    state = {names[key].replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): state[key] for key in state}
    if "register_tokens" in state:
        position = state["pos_embed"]  # (1, 1 + N, D)
        state["reg_token"] = state.pop("register_tokens")  # (1, R, D)
        state["cls_token"] = state["cls_token"] + position[:, :1]
        state["pos_embed"] = position[:, 1:]
    return state


def _name_foreign_file(content: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Return what a file of another tool is and what to do with it; empty if it is not known."""
    keys = state.keys()
    if "storage_tokens" in keys or any("rope_embed" in key for key in keys):
        return "it is a DINOv3 file, with rotary position embeddings, which are not supported yet"
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
    scaled = any(key.endswith("ls1.gamma") for key in state)  # by LayerScale
    prefix = 0 if scaled and registers else 1 + registers  # positions of tokens before the patches
    count = state["pos_embed"].shape[1] - prefix
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"{origin}: {count} position embeddings of patches are no square grid, which is not supported")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    return BackboneConfig(
        name=_timm_name(state, scaled=scaled, registers=registers),
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


def _timm_name(state: dict[str, Tensor], *, scaled: bool, registers: int) -> str:
    """Return a model of timm with the same parts; its sizes are given beside it."""
    if not scaled:
        return "vit_tiny_patch16_224"
    hidden, width = state["blocks.0.mlp.fc1.weight"].shape  # gated MLPs have twice the hidden width in one
    size = "giant" if hidden > 4 * width else "small"
    return f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"


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
