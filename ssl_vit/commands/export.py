"""`ssl-vit export`: a checkpoint's backbone as a file that bare timm loads."""

from __future__ import annotations

import json

from ssl_vit.config.pretrain import ExportConfig
from ssl_vit.models.checkpoint import export_backbone, load_backbone
from ssl_vit.runtime.errors import UserError


def main(config: ExportConfig) -> None:
    """Run the command."""
    if config.out.suffix != ".safetensors":
        raise UserError(f"out={config.out}: name a file that ends in .safetensors")
    loaded = load_backbone(config.checkpoint, config.weights)
    export_backbone(loaded.backbone, config.out, mean=loaded.mean, std=loaded.std, source=loaded.source)
    sidecar = config.out.with_suffix(".json")
    print(f"{config.out} holds {loaded.source}. To load it ({sidecar} says so too):")
    for line in ("import safetensors.torch, timm", *json.loads(sidecar.read_text(encoding="utf-8"))["load"]):
        print(f"  {line}")
