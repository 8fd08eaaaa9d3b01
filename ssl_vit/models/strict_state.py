"""Build a backbone from weights whose names and shapes must match exactly, and which must be finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.errors import UserError


def build_strictly(config: BackboneConfig, state: Mapping[str, Tensor], origin: str) -> Backbone:
    """Build a frozen backbone from weights under timm's names, whose keys and shapes must match exactly.

    Memory is allocated only after the sizes in the configuration have been compared with those of the weights.

    Raises:
        UserError: Listing the keys that are missing, unexpected, or of another shape; or weights are not finite.
    """
    with torch.device("meta"):
        _check_state_dict(Backbone(config), state, origin)
    _check_finite(state, origin)
    backbone = Backbone(config)
    backbone.vit.load_state_dict(dict(state))
    return backbone.requires_grad_(False).eval()


def _check_finite(state: Mapping[str, Tensor], origin: str) -> None:
    broken = [name for name, weights in state.items() if not weights.isfinite().all()]
    if broken:
        raise UserError(
            f"{origin}: {len(broken):,} of {len(state):,} weights are not finite ({_shortened(broken, 3)}): the "
            "training has diverged, or the file is damaged; use an earlier checkpoint"
        )


def _check_state_dict(backbone: Backbone, state: Mapping[str, Tensor], origin: str) -> None:
    expected = backbone.vit.state_dict()
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(problems.values()):
        lines = [f"  {what}: {_shortened(keys)}" for what, keys in problems.items() if keys]
        raise UserError("\n".join([f"{origin} does not fit {backbone.config.name}", *lines]))


def _shortened(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
