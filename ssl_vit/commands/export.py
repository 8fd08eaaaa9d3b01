"""`ssl-vit export`: write the backbone of a checkpoint as a file that timm loads."""

from __future__ import annotations

import json

from ssl_vit.config.pretrain import ExportConfig
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.export import export_backbone, is_export
from ssl_vit.runtime.errors import UserError


def main(config: ExportConfig) -> None:
    """Run the command."""
    if config.out.suffix != ".safetensors":
        raise UserError(f"out={config.out}: the file name must end in .safetensors")
    if config.out.exists() and not config.overwrite and not is_export(config.out):
        raise UserError(f"out={config.out} exists and is no file of `ssl-vit export`; overwrite=true replaces it")
    loaded = load_backbone(config.checkpoint, config.weights, num_heads=config.num_heads)
    export_backbone(
        loaded.backbone,
        config.out,
        mean=loaded.mean,
        std=loaded.std,
        source=loaded.source,
        value_range=loaded.value_range,
    )
    sidecar = config.out.with_suffix(".json")
    print(f"{config.out} contains {loaded.source}. Load it with (also in {sidecar}):")
    for line in ("import safetensors.torch, timm", *json.loads(sidecar.read_text(encoding="utf-8"))["load"]):
        print(f"  {line}")
