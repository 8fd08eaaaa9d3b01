"""Which parameters of a backbone are trained: all, norms, the last blocks, or low-rank updates."""

from __future__ import annotations

import re

from torch import nn

from ssl_vit.models.backbone import Backbone
from ssl_vit.models.lora import add_lora


def select_trainable(backbone: Backbone, trainable: str) -> None:
    """Freeze what `all`, `norms`, `last_<n>_blocks` or `lora_<rank>` leaves out, in place.

    The last blocks include the final norm. LoRA updates all linear layers of the blocks, and nothing else.

    Raises:
        ValueError: The backbone has fewer blocks.
    """
    if trainable == "all":
        return
    backbone.requires_grad_(False)
    number = int(re.sub(r"\D", "", trainable) or 0)
    if trainable == "norms":
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    elif trainable.startswith("lora"):
        add_lora(backbone.vit.blocks, number)
    elif number > backbone.num_blocks:
        raise ValueError(f"start.trainable={trainable}: the backbone has {backbone.num_blocks} blocks")
    else:
        for module in (*backbone.vit.blocks[-number:], backbone.vit.norm):
            module.requires_grad_(True)
