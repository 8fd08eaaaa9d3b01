"""Fine-tuning of the whole model on labels, with a lower learning rate for earlier layers."""

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
from ssl_vit.methods.base import SSLMethod, stack_views
from ssl_vit.methods.heads import mlp
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.methods.step_result import StepResult, StudentOutput
from ssl_vit.models.backbone import Backbone, Tokens
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.device import upcast


class Classifier(nn.Module):
    """Backbone with a linear head on its [CLS] token."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = mlp([backbone.embed_dim, classes])

    def forward(self, images: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tokens]:
        """Compute logits (B, classes) and tokens of images (B, C, H, W); sample keys (B,) are for drop path."""
        tokens = self.backbone(images, key)
        return self.head(tokens.cls), tokens

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the parameters of each layer for timm: embeddings, each block, and the rest (final norm, head)."""
        return self.backbone.layer_patterns("backbone.")


class FineTune(SSLMethod):
    """Supervised training with mixup, CutMix and label smoothing on the views of `single_view_config`."""

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
        logits, tokens = self.student(images, batch.key)
        self.timer.mark("student")
        loss = F.cross_entropy(upcast(logits), targets)
        self.timer.mark("loss")
        return StepResult(loss, tokens.cls.detach()[None], {}, StudentOutput(images, tokens))

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW with rate lr · layer_decay^(L - l) for layer l of L; the head is layer L (arXiv 2106.08254)."""
        kept = [name for name, value in self.student.named_parameters() if not self.has_weight_decay(name, value)]
        groups = param_groups_layer_decay(
            self.student,
            weight_decay=1.0,  # marks the groups; the value follows the schedule
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
    """Return a trainable copy for images of this size, to which its position embeddings are resampled once."""
    backbone = Backbone(loaded.backbone.config.model_copy(update={"drop_path": drop_path}))
    backbone.load_state_dict(loaded.backbone.state_dict())
    backbone.resize(image_size)
    return backbone
