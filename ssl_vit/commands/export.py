"""`ssl-vit export`: write the backbone of a checkpoint as a file that timm loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ssl_vit.config.pretrain import ExportConfig
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.export import export_backbone, is_export
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import check_outputs, record_outputs


def main(config: ExportConfig) -> None:
    """Run the command."""
    if config.out.suffix != ".safetensors":
        raise UserError(f"out={config.out}: the file name must end in .safetensors")
    outputs = [config.out, config.out.with_suffix(".json")]
    source = config.checkpoint if Path(config.checkpoint).is_file() else None
    is_own = config.overwrite or is_export(config.out)
    try:
        check_outputs(outputs, "export", inputs={"checkpoint": source}, is_own=is_own)
    except UserError as error:
        hint = "" if is_own or "exists" not in str(error) else "; overwrite=true replaces it"
        raise UserError(f"{error}{hint}") from None
    loaded = load_backbone(config.checkpoint, config.weights, num_heads=config.num_heads)
    export_backbone(
        loaded.backbone,
        config.out,
        mean=loaded.mean,
        std=loaded.std,
        source=loaded.source,
        value_range=loaded.value_range,
        dtype=getattr(torch, config.dtype),
    )
    record_outputs(outputs, "export")
    sidecar = config.out.with_suffix(".json")
    print(f"{config.out} contains {loaded.source}. Load it with (also in {sidecar}):")
    for line in ("import safetensors.torch, timm", *json.loads(sidecar.read_text(encoding="utf-8"))["load"]):
        print(f"  {line}")
