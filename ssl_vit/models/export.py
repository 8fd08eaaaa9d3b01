"""Exported backbones: a safetensors file with timm's names, and a JSON file beside it that describes the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.config.types import AUTO_RANGE, Positive, StrictConfig, ValueRange, ValueRangeField
from ssl_vit.models.backbone import Backbone, timm_kwargs
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.errors import UserError

_DESCRIPTION = "ssl_vit"  # key of the description in the file of the weights


class ModelDescription(StrictConfig):
    """Architecture and normalization of a backbone, as stored in checkpoints and exported files."""

    backbone: BackboneConfig
    mean: list[float]
    std: list[Positive]
    value_range: ValueRangeField = AUTO_RANGE  # files of earlier versions have none

    @model_validator(mode="after")
    def _channels_agree(self) -> Self:
        if not len(self.mean) == len(self.std) == self.backbone.in_chans:
            raise ValueError("mean and std need a number for each channel")
        return self


def export_backbone(
    backbone: Backbone,
    path: Path,
    *,
    mean: list[float],
    std: list[float],
    source: str,
    value_range: ValueRange = AUTO_RANGE,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the weights under timm's names, and beside them a JSON file that explains how to load them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in backbone.vit.state_dict().items()}
    config = backbone.config
    description = {
        "normalization": {"mean": mean, "std": std},
        "value_range": str(value_range),
        "backbone": config.model_dump(mode="json"),
    }
    with atomic_write(path) as file:
        file.write(save(state, {_DESCRIPTION: json.dumps(description)}))
    arguments = ", ".join(f"{name}={value!r}" for name, value in timm_kwargs(config).items())
    sidecar = {
        "load": [
            f'model = timm.create_model("{config.name}", {arguments})',
            f'model.load_state_dict(safetensors.torch.load_file("{path.name}"))',
        ],
        **description,
        "features": "model.forward_features(images)[:, 0] is the [CLS] token after the final norm",
        "source": source,
        "sha256": file_sha256(path),
    }
    write_json(path.with_suffix(".json"), sidecar)


def read_export(path: Path) -> tuple[ModelDescription, dict[str, Tensor], str]:
    """Read an exported backbone: its description, its weights under timm's names, and the SHA-256 of the file.

    Raises:
        UserError: A file is damaged, or the weights are not those that the JSON describes.
    """
    sidecar_path = path.with_suffix(".json")
    try:
        sidecar = json.loads(sidecar_path.read_text(encoding="utf-8"))
        key = "normalization" if "normalization" in sidecar else "normalisation"  # the key of version 0.1
        value_range = sidecar.get("value_range", AUTO_RANGE)
        description = ModelDescription(backbone=sidecar["backbone"], value_range=value_range, **sidecar[key])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # no JSON, or one of another tool
        raise UserError(f"checkpoint={path}: {sidecar_path.name} is not a file of `ssl-vit export`") from None
    sha256 = file_sha256(path)
    _check_description(path, sidecar)
    if sidecar.get("sha256", sha256) != sha256:  # files of other tools may have none
        raise UserError(
            f"checkpoint={path}: damaged or replaced, as {sidecar_path.name} has another SHA-256; export it again"
        )
    return description, load_safetensors(path), sha256


def _check_description(path: Path, sidecar: dict[str, Any]) -> None:
    """Compare the JSON file with the description in the file of the weights; files of version 0.1 have none.

    Raises:
        UserError: They differ, so that the model would compute something else.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = (file.metadata() or {}).get(_DESCRIPTION)
    except (SafetensorError, OSError):  # reported when the weights are loaded
        return
    if stored is not None and any(sidecar.get(key) != value for key, value in json.loads(stored).items()):
        raise UserError(
            f"checkpoint={path}: {path.with_suffix('.json').name} describes another architecture or normalization than "
            "the file of the weights itself; restore it, or export again"
        )


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"checkpoint={path}: damaged safetensors file: {error}") from None


def is_export(path: Path) -> bool:
    """Return whether a file is an intact export with its JSON file."""
    try:
        read_export(path)
    except (UserError, OSError):
        return False
    return True


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
