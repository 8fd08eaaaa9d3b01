"""Fine-tuning: the whole model learns from labels, the deeper its layers lie the slower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ssl_vit.config.evaluate import FinetuneMethodConfig
from ssl_vit.config.methods import ViewsConfig
from ssl_vit.data.batch import Batch
from ssl_vit.data.transforms.mixup import MixupCutmix
from ssl_vit.methods.base import SSLMethod, StepResult, stack_views
from ssl_vit.methods.heads import mlp
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.device import upcast


class Classifier(nn.Module):
    """A backbone and a linear head on its [CLS] token."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = mlp([backbone.embed_dim, classes])

    def forward(self, images: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and [CLS] tokens (B, D) of images (B, C, H, W); drop path is drawn from keys (B,)."""
        cls = self.backbone(images, key).cls
        return self.head(cls), cls

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """For timm, which parameters make up a layer: embeddings, each block, and what is left (final norm, head)."""
        return self.backbone.layer_patterns("backbone.")


class FineTune(SSLMethod):
    """Cross-entropy with the targets that mixing and smoothing leave of the labels.

    Not self-supervised, but trained as the others are, step by step.

    Args:
        config: Of the augmentation and the optimizer.
        views: As `single_view_config` makes them.
        backbone: To be trained.
        classes: That images are told apart by.
        plan: Length of the run.
    """

    config: FinetuneMethodConfig

    def __init__(
        self, config: FinetuneMethodConfig, views: ViewsConfig, backbone: Backbone, classes: int, plan: TrainingPlan
    ) -> None:
        super().__init__(config, views, plan)
        self.student = Classifier(backbone, classes)
        self.mixing = MixupCutmix(config, classes)

    @property
    def eval_backbone(self) -> Backbone:
        return self.student.backbone

    def forward(self, global_views: Tensor, local_views: Tensor) -> list[Tensor]:
        return [self.student(stack_views(global_views))[0]]

    def step(self, global_views: Tensor, local_views: Tensor, batch: Batch) -> StepResult:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            images, targets = self.mixing(global_views.squeeze(1), batch.label, batch.key)  # (B, C, H, W), (B, classes)
        self.timer.mark("augmentation")
        logits, cls = self.student(images, batch.key)
        self.timer.mark("student")
        loss = F.cross_entropy(upcast(logits), targets)
        self.timer.mark("loss")
        return StepResult(loss, cls.detach()[None], {})

    def has_weight_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Return True for all but biases, one-dimensional parameters, positions and tokens."""
        return parameter.ndim > 1 and not name.endswith((".bias", "pos_embed", "cls_token", "reg_token"))

    def configure_optimizers(self) -> Optimizer:
        """AdamW whose layer l of L learns at lr · layer_decay^(L - l); the head is layer L (BEiT, arXiv 2106.08254)."""
        kept = [
            name for name, parameter in self.student.named_parameters() if not self.has_weight_decay(name, parameter)
        ]
        groups = param_groups_layer_decay(
            self.student,
            weight_decay=1.0,  # a mark; the schedule says how much
            no_weight_decay_list=kept,
            layer_decay=self.config.layer_decay,
        )
        for group in groups:
            group["decays"] = group["weight_decay"] > 0
        return AdamW(groups, lr=self.schedules["lr"](0), betas=self.config.optimizer.betas, fused=True)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] *= group["lr_scale"]


def prepare_for_finetuning(loaded: LoadedBackbone, *, image_size: int, drop_path: float) -> Backbone:
    """The model as one that learns on images of this size: its position embeddings are resampled to it, once."""
    backbone = Backbone(loaded.backbone.config.model_copy(update={"drop_path": drop_path}))
    backbone.load_state_dict(loaded.backbone.state_dict())
    backbone.resize(image_size)
    return backbone
