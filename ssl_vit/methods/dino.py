"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_vit.config.methods import DINOConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.batch import Batch
from ssl_vit.losses.dino import Center, FactoredLogits, TeacherTargets, assignment_stats, dino_loss
from ssl_vit.methods.base import SSLMethod, make_backbone, stack_views
from ssl_vit.methods.heads import DINOHead
from ssl_vit.methods.health import HealthCheck, check_assignments, check_teacher_distance
from ssl_vit.methods.schedules import Schedule, TrainingPlan, cosine, first_momentum, teacher_temperature
from ssl_vit.methods.step_result import StepResult, StudentOutput
from ssl_vit.models.backbone import Backbone, Tokens
from ssl_vit.models.ema import init_teacher, relative_parameter_distance, update_ema
from ssl_vit.runtime.rng import view_keys


class DINOModel(nn.Module):
    """Backbone and head; the head processes the [CLS] tokens of all resolutions in one pass."""

    def __init__(self, backbone: Backbone, config: DINOConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = DINOHead(backbone.embed_dim, config.head)

    def forward(self, *resolutions: Tensor, key: Tensor | None = None) -> tuple[FactoredLogits, Tokens]:
        """Compute logits (Σ V·B, K) of images (V·B, C, H, W) of one resolution each, and the tokens of the first.

        Sample keys (Σ V·B,) of all images are for drop path in training.
        """
        keys = [None] * len(resolutions) if key is None else torch.split(key, [len(images) for images in resolutions])
        tokens = [self.backbone(images, k) for images, k in zip(resolutions, keys, strict=True)]
        return self.head(torch.cat([each.cls for each in tokens])), tokens[0]


class DINO(SSLMethod):
    """The student gets all views, the teacher the global ones; the teacher is the student's moving average."""

    config: DINOConfig

    def __init__(self, config: DINOConfig, backbone: BackboneConfig, plan: TrainingPlan) -> None:
        super().__init__(config, config.views, plan)
        self.student = DINOModel(make_backbone(backbone, drop_path=True), config)
        self.teacher = init_teacher(DINOModel(make_backbone(backbone, drop_path=False), config), self.student)
        self.center = Center(config.head.prototypes, config.teacher.center_momentum)
        self.frozen_steps = config.freeze_last_layer.steps(plan.steps_per_epoch, plan.total_steps)

    @classmethod
    def make_schedules(cls, config: DINOConfig, plan: TrainingPlan) -> dict[str, Schedule]:
        teacher, steps, per_epoch = config.teacher, plan.total_steps, plan.steps_per_epoch
        warmup_epochs = -(-teacher.warmup.steps(per_epoch, steps) // per_epoch)
        temperatures = teacher.warmup_temperature, teacher.temperature
        momentum = first_momentum(teacher, plan), teacher.momentum[1]
        return {
            **super().make_schedules(config, plan),
            "teacher_momentum": cosine(*momentum, steps),
            "teacher_temperature": teacher_temperature(*temperatures, warmup_epochs, per_epoch),
        }

    @property
    def eval_backbone(self) -> Backbone:
        return self.teacher.backbone

    def health_checks(self) -> list[HealthCheck]:
        assignments = partial(check_assignments, prototypes=self.config.head.prototypes)
        return [check_teacher_distance, assignments, *super().health_checks()]

    def forward(self, global_views: Tensor, local_views: Tensor) -> list[Tensor]:
        images = _by_resolution(global_views, local_views)
        with torch.no_grad():
            teacher, _ = self.teacher(images[0])
        student, _ = self.student(*images)
        return [logits.block(slice(None)) for logits in (teacher, student)]

    def step(self, global_views: Tensor, local_views: Tensor, batch: Batch) -> StepResult:
        views = global_views.shape[1] + local_views.shape[1]
        images = _by_resolution(global_views, local_views)
        with torch.no_grad():
            teacher, teacher_tokens = self.teacher(images[0])  # (2·B, K)
            targets = TeacherTargets(teacher, self.center.value, self.scheduled("teacher_temperature"))
            self.center.accumulate(teacher)
        self.timer.mark("teacher")

        student, tokens = self.student(*images, key=view_keys(batch.key, 0, views).T.flatten())  # (V·B, K)
        self.timer.mark("student")
        loss = dino_loss(student, targets, views=views, temperature=self.config.student_temperature)
        self.timer.mark("loss")
        logs: dict[str, Tensor] = {}
        if self.should_log:
            entropy, kl, mutual_information = assignment_stats(targets)
            logs = {
                "teacher_entropy": entropy,
                "teacher_kl_to_uniform": kl,
                "assignment_mutual_information": mutual_information,
                "center_norm": self.center.value.norm(),
                "teacher_distance": relative_parameter_distance(self.teacher, self.student),
            }
        features = teacher_tokens.cls.unflatten(0, (2, -1))  # (2, B, D)
        return StepResult(loss, features, logs, StudentOutput(images[0], tokens))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.global_step < self.frozen_steps:
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None  # not requires_grad: that would change the graph under DDP

    def after_optimizer_step(self, step: int, applied: Tensor) -> None:
        update_ema(self.teacher, self.student, self.schedules["teacher_momentum"](step), applied)
        self.center.update(applied)

    def has_weight_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Return True for all but biases and one-dimensional parameters (in DINO, tokens and positions decay)."""
        return not name.endswith(".bias") and parameter.ndim > 1


def _by_resolution(global_views: Tensor, local_views: Tensor) -> list[Tensor]:
    """Return the views as images (G·B, C, H, W) and, if there are local ones, (L·B, C, h, w)."""
    return [stack_views(views) for views in (global_views, local_views) if views.shape[1]]
