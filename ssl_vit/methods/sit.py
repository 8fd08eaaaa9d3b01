"""SiT: self-supervised vision transformer (Atito et al. 2021, arXiv 2104.03602), as version 1.1 of its code."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_vit.config.methods import SiTConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.batch import Batch
from ssl_vit.data.transforms.corruption import Corruption, corrupt_views, rotate, sample_rotations
from ssl_vit.losses.nt_xent import nt_xent
from ssl_vit.losses.reconstruction import reconstruction_l1
from ssl_vit.losses.uncertainty_weighting import FixedWeights, UncertaintyWeights
from ssl_vit.methods.base import SSLMethod, make_backbone, stack_views
from ssl_vit.methods.heads import ReconstructionHead, mlp
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.methods.step_result import ImageRestorer, PretextViews, StepResult, StudentOutput
from ssl_vit.models.backbone import Backbone, Tokens
from ssl_vit.models.checkpoint import LAST
from ssl_vit.models.lora import merge_lora
from ssl_vit.models.official_checkpoints import torch_load_weights_only
from ssl_vit.runtime.device import to_device_async, upcast
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import view_keys


class SiTModel(nn.Module):
    """Backbone with one head per enabled loss.

    [CLS] is the contrastive token, so that the exported backbone's pooled feature is the semantic one. The rotation is
    predicted from a register token of its own, or from [CLS] with tokens=shared.
    """

    def __init__(self, config: SiTConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.rotation_token = config.own_registers > 0
        registers = backbone.reg_tokens + config.own_registers
        self.backbone = make_backbone(backbone.model_copy(update={"reg_tokens": registers}), drop_path=True)
        self.backbone.init_prefix_tokens(std=0.02)
        dim, contrastive = self.backbone.embed_dim, config.contrastive
        self.heads = nn.ModuleDict()
        if config.rotation.enabled:
            self.heads["rotation"] = mlp([dim, 4])
        if contrastive.enabled:
            hidden = [contrastive.hidden_dim] if contrastive.head == "mlp" else []
            self.heads["contrastive"] = mlp([dim, *hidden, contrastive.dim])
        if config.reconstruction.enabled:
            self.heads["reconstruction"] = ReconstructionHead(dim, backbone.patch_size, backbone.in_chans)

    def forward(self, images: Tensor, key: Tensor | None = None) -> tuple[Tokens, dict[str, Tensor]]:
        """Compute the tokens of (B, C, H, W), and the heads' outputs by loss; sample keys (B,) are for drop path.

        The outputs: rotation (B, 4), contrastive (B, dim), reconstruction (B, C, H, W).
        """
        tokens = self.backbone(images, key)
        outputs = {}
        if "rotation" in self.heads:
            outputs["rotation"] = self.heads["rotation"](tokens.registers[:, 0] if self.rotation_token else tokens.cls)
        if "contrastive" in self.heads:
            outputs["contrastive"] = self.heads["contrastive"](tokens.cls)
        if "reconstruction" in self.heads:
            outputs["reconstruction"] = self.heads["reconstruction"](tokens.patches, tokens.grid)
        return tokens, outputs


class SiT(SSLMethod):
    """Two views, each rotated and corrupted: restore the view, classify the rotation, match the other view."""

    config: SiTConfig

    def __init__(self, config: SiTConfig, backbone: BackboneConfig, plan: TrainingPlan) -> None:
        super().__init__(config, config.views, plan)
        self.student = SiTModel(config, backbone)
        names = list(self.student.heads)
        self.weights = (
            UncertaintyWeights(names)
            if config.weighting == "uncertainty"
            else FixedWeights({name: getattr(config, name).weight for name in names})
        )

    @property
    def eval_backbone(self) -> Backbone:
        return self.student.backbone

    def forward(self, global_views: Tensor, local_views: Tensor) -> list[Tensor]:
        _, outputs = self.student(stack_views(global_views))
        return list(outputs.values())

    def step(self, global_views: Tensor, local_views: Tensor, batch: Batch) -> StepResult:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            views = self.pretext_views(self.config, global_views, batch.key)
        self.timer.mark("corruption")

        tokens, outputs = self.student(views.corrupted, view_keys(batch.key, 0, 2).T.flatten())
        self.timer.mark("student")

        losses, logs = {}, dict[str, Tensor]()
        if "rotation" in outputs:
            losses["rotation"] = F.cross_entropy(upcast(outputs["rotation"]), views.quarter)
            logs["rotation_accuracy"] = (outputs["rotation"].argmax(-1) == views.quarter).float().mean()
        if "contrastive" in outputs:
            losses["contrastive"], logs["contrastive_accuracy"] = nt_xent(
                *outputs["contrastive"].chunk(2),
                temperature=self.config.contrastive.temperature,
                gather=self.config.contrastive.gather,
            )
        if "reconstruction" in outputs:
            valid = views.mask if self.config.reconstruction.loss_on == "corrupted" else None
            losses["reconstruction"] = reconstruction_l1(outputs["reconstruction"], views.target, valid)
        total = self.weights(losses)
        self.timer.mark("loss")
        logs |= {name: loss.detach() for name, loss in losses.items()}
        if isinstance(self.weights, UncertaintyWeights):
            logs |= {f"weight_{name}": self.weights.weight(name).detach() for name in losses}
        features = tokens.cls.detach().unflatten(0, (2, -1))  # (2, B, D)
        return StepResult(total, features, logs, StudentOutput(views.corrupted, tokens))

    @classmethod
    def pretext_views(cls, config: SiTConfig, global_views: Tensor, key: Tensor) -> PretextViews:
        target = stack_views(global_views)
        quarter = torch.zeros(len(target), dtype=torch.int64, device=target.device)
        if config.rotation.enabled:
            quarter = to_device_async(sample_rotations(key).T.flatten(), target.device)
            target = rotate(target, quarter)
        corrupted, mask = corrupt_views(Corruption(config.corruption), target, key)
        return PretextViews(target, corrupted, mask, quarter)

    def figures(self) -> dict[str, ImageRestorer]:
        return _figures(self.student, self.config)

    @classmethod
    def load_figures(cls, checkpoint: Path, config: SiTConfig, backbone: BackboneConfig) -> dict[str, ImageRestorer]:
        path = checkpoint / "checkpoints" / LAST if checkpoint.is_dir() else checkpoint
        if not config.reconstruction.enabled or path.suffix != ".ckpt" or not path.is_file():
            return {}
        weights = torch_load_weights_only(path).get("state_dict")
        if not isinstance(weights, dict):
            raise UserError(f"checkpoint={path} is not a checkpoint of a run")
        prefix = "student."
        state = {
            key.removeprefix(prefix): value for key, value in merge_lora(weights).items() if key.startswith(prefix)
        }
        with torch.device("meta"):  # memory is allocated only for what the file holds
            model = SiTModel(config, backbone)
        try:
            model.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:  # it lists the keys
            raise UserError(f"checkpoint={path} does not fit the run's config.yaml: {error}") from None
        return _figures(model.requires_grad_(False).eval(), config)


def _figures(model: SiTModel, config: SiTConfig) -> dict[str, ImageRestorer]:
    def restore(corrupted: Tensor) -> Tensor:
        with torch.no_grad():
            _, outputs = model(corrupted.to(model.backbone.device))
        restored: Tensor = outputs["reconstruction"]
        return restored

    corrupt = partial(Corruption(config.corruption), view=0)
    return {"reconstruction": ImageRestorer(corrupt, restore)} if config.reconstruction.enabled else {}
