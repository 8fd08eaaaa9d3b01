"""SiT's model with its heads, from a checkpoint: what restores corrupted images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.config.methods import MethodConfig, SiTConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.methods.sit import SiTModel
from ssl_vit.models.checkpoint import LAST
from ssl_vit.models.torch_load import torch_load_weights_only
from ssl_vit.runtime.errors import UserError


def has_reconstruction(method: MethodConfig) -> bool:
    """Whether a run of this method learns to restore images."""
    return isinstance(method, SiTConfig) and method.reconstruction.enabled


def load_sit_model(checkpoint: Path, method: MethodConfig, backbone: BackboneConfig) -> SiTModel | None:
    """The frozen model of a SiT run, in evaluation mode on the CPU.

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
    if (
        not isinstance(method, SiTConfig)
        or not has_reconstruction(method)
        or path.suffix != ".ckpt"
        or not path.is_file()
    ):
        return None
    content = torch_load_weights_only(path)
    weights = content.get("state_dict")
    if not isinstance(weights, dict):
        raise UserError(f"checkpoint={path} is not a checkpoint of a run")
    prefix = "student."
    state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    with torch.device("meta"):  # memory is taken only for what the file holds
        model = SiTModel(method, backbone)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:  # which names the keys
        raise UserError(f"checkpoint={path} does not fit the run's config.yaml: {error}") from None
    return model.requires_grad_(False).eval()


def reconstruct(model: SiTModel, dataset: Tensor) -> Tensor:
    """What the model makes of normalized corrupted images (B, C, S, S), normalized as these."""
    device = model.backbone.device
    with torch.no_grad():
        _, outputs = model(dataset.to(device))
    made: Tensor = outputs["reconstruction"]
    return made
