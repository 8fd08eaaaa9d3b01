"""A third training method: a loss, a configuration class and a method. With a YAML it is all that a method needs."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_vit.config.methods import MethodConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.config.types import NonNegative
from ssl_vit.data.batch import Batch
from ssl_vit.methods.base import SSLMethod, make_backbone, stack_views
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.methods.step_result import StepResult, StudentOutput
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.device import upcast
from ssl_vit.runtime.rng import view_keys


def toy_loss(first: Tensor, second: Tensor, *, std_weight: float) -> Tensor:
    """Compute the distance of two views' features (B, D), with a penalty on a small standard deviation."""
    z = upcast(first), upcast(second)
    stds = [each.var(dim=0, correction=0).add(1e-4).sqrt() for each in z]  # (D,) each
    return F.mse_loss(*z) + std_weight * sum(F.relu(1 - std).mean() for std in stds)


class ToyConfig(MethodConfig):
    title = "Toy"

    name: Literal["toy"]
    std_weight: NonNegative


class Toy(SSLMethod):
    config: ToyConfig

    def __init__(self, config: ToyConfig, backbone: BackboneConfig, plan: TrainingPlan) -> None:
        super().__init__(config, config.views, plan)
        self.student = nn.ModuleDict({"backbone": make_backbone(backbone, drop_path=True)})

    @property
    def eval_backbone(self) -> Backbone:
        return self.student["backbone"]

    def forward(self, global_views: Tensor, local_views: Tensor) -> list[Tensor]:
        return [self.eval_backbone(stack_views(global_views)).cls]

    def step(self, global_views: Tensor, local_views: Tensor, batch: Batch) -> StepResult:
        images = stack_views(global_views)
        tokens = self.eval_backbone(images, view_keys(batch.key, 0, 2).T.flatten())
        loss = toy_loss(*tokens.cls.chunk(2), std_weight=self.config.std_weight)
        return StepResult(loss, tokens.cls.detach().unflatten(0, (2, -1)), {}, StudentOutput(images, tokens))

    def has_weight_decay(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1
