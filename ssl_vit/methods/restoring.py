"""SiT's network with its heads, from a checkpoint: what restores corrupted pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.config import BackboneConfig, MethodConfig, SiTConfig
from ssl_vit.errors import UserError
from ssl_vit.methods.sit import SiTNetwork
from ssl_vit.models.plain import read_plain
from ssl_vit.training.checkpoints import LAST


def restores(method: MethodConfig) -> bool:
    """Whether a run of this method learns to restore pictures."""
    return isinstance(method, SiTConfig) and method.reconstruction.enabled


def load_restorer(checkpoint: Path, method: MethodConfig, backbone: BackboneConfig) -> SiTNetwork | None:
    """The frozen network of a SiT run, in evaluation mode on the CPU.

    Args:
        checkpoint: The folder of the run, or one of its `.ckpt` files.
        method: Of the run.
        backbone: Of the run's configuration.

    Returns:
        None where there is nothing that restores: the run is not of SiT or has its reconstruction turned off, or only
        an exported backbone is there.

    Raises:
        UserError: The file is damaged, or its keys do not fit exactly.
    """
    path = checkpoint / "checkpoints" / LAST if checkpoint.is_dir() else checkpoint
    if not isinstance(method, SiTConfig) or not restores(method) or path.suffix != ".ckpt" or not path.is_file():
        return None
    content = read_plain(path)
    weights = content.get("state_dict")
    if not isinstance(weights, dict):
        raise UserError(f"checkpoint={path} is not a checkpoint of a run")
    prefix = "student."
    state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    with torch.device("meta"):  # memory is taken only for what the file holds
        network = SiTNetwork(method, backbone)
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:  # which names the keys
        raise UserError(f"checkpoint={path} does not fit the run's config.yaml: {error}") from None
    return network.requires_grad_(False).eval()


def restored(network: SiTNetwork, pictures: Tensor) -> Tensor:
    """What the network makes of normalised corrupted pictures (B, C, S, S), normalised as these."""
    device = network.backbone.vit.patch_embed.proj.weight.device
    with torch.no_grad():
        _, outputs = network(pictures.to(device))
    made: Tensor = outputs["reconstruction"]
    return made
