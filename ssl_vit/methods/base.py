"""What DINO and SiT share as Lightning modules: optimizer, schedules, clipping, logging, checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ssl_vit import __version__
from ssl_vit.config import BackboneConfig, DINOConfig, SiTConfig
from ssl_vit.distributed import all_mean, gather
from ssl_vit.losses.diversity import effective_rank, spread
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.weights import CHECKPOINT_KEY
from ssl_vit.training.schedules import Schedule, cosine
from ssl_vit.transforms.batch import Batch
from ssl_vit.transforms.photometric import Photometric


class Plan(NamedTuple):
    """The length of a run, in optimizer steps, and what its randomness and learning rate derive from."""

    total_steps: int
    steps_per_epoch: int
    batch_size: int  # global: over all processes and accumulated micro-batches
    log_every: int
    seed: int


class StepResult(NamedTuple):
    """What a method makes of a batch."""

    loss: Tensor  # ()
    features: Tensor  # (B, D), the [CLS] tokens of one view, without gradient; their health is logged
    logs: dict[str, Tensor]  # scalars


class SSLMethod(L.LightningModule):
    """A method is a `step`; everything around it is here. All schedules are functions of the optimizer step."""

    def __init__(self, config: DINOConfig | SiTConfig, plan: Plan) -> None:
        super().__init__()
        self.config = config
        self.plan = plan
        self.photometric = Photometric(config.views)
        self.logged = torch.empty(0)
        optimizer = config.optimizer
        self.peak_lr = optimizer.lr * plan.batch_size / optimizer.lr_batch_size
        self.warmup_steps = optimizer.warmup.steps(plan.steps_per_epoch, plan.total_steps)
        self.schedules: dict[str, Schedule] = {
            "lr": cosine(self.peak_lr, optimizer.min_lr, plan.total_steps, self.warmup_steps),
            "weight_decay": cosine(*optimizer.weight_decay, plan.total_steps),
        }

    @abstractmethod
    def step(self, global_views: Tensor, local_views: Tensor, batch: Batch) -> StepResult:
        """The loss of float views (B, G, C, H, W) and (B, L, C, h, w)."""

    @abstractmethod
    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter."""

    @property
    @abstractmethod
    def target(self) -> Backbone:
        """The backbone that evaluation and export take."""

    @property
    def prototypes(self) -> int | None:
        """Number of classes that the method sorts pictures into by itself, if it does."""
        return None

    def after_optimizer_step(self, step: int) -> None:
        """Called once per optimizer step, after it; `step` counts from 0."""

    def scheduled(self, name: str) -> float:
        """The value of a schedule at the step at hand."""
        return self.schedules[name](self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            global_views = self.photometric(batch.global_views, batch.key)
            local_views = self.photometric(batch.local_views, batch.key, first_view=batch.global_views.shape[1])
        result = self.step(global_views, local_views, batch)
        if self.at_log_step:
            self.log_step(result, first=batch_idx % self.trainer.accumulate_grad_batches == 0)
        return result.loss

    def log_step(self, result: StepResult, *, first: bool) -> None:
        """Log means over all processes and over the step's micro-batches so far, of which this is the `first`."""
        features = gather(result.features)
        logs = {"loss": result.loss.detach(), **result.logs}
        logs |= {"spread": spread(features), "effective_rank": effective_rank(features)}
        values = all_mean(torch.stack([value.float() for value in logs.values()]))
        self.logged = torch.stack([values]) if first else torch.cat([self.logged, values[None]])  # (micro-batches, n)
        names = [f"train/{name}" for name in logs]
        self.log_dict(dict(zip(names, self.logged.mean(dim=0).unbind(), strict=True)), logger=False)
        self.log_dict({f"schedule/{name}": self.scheduled(name) for name in self.schedules}, logger=False)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(key=batch.key)  # randomness is drawn on the CPU, which then never waits for a GPU

    @property
    def at_log_step(self) -> bool:
        """Whether a row of metrics is written after this step."""
        return (self.global_step + 1) % self.plan.log_every == 0

    def configure_optimizers(self) -> Optimizer:
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[self.decays(name, parameter)].append(parameter)
        return AdamW(
            [{"params": groups[True], "decays": True}, {"params": groups[False], "decays": False, "weight_decay": 0.0}],
            lr=self.peak_lr,
            betas=self.config.optimizer.betas,
            fused=True,
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.scheduled("lr")
            if group["decays"]:
                group["weight_decay"] = self.scheduled("weight_decay")

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: object, **__: object) -> None:
        if self.config.optimizer.clip:
            precision = self.trainer.precision_plugin
            if isinstance(precision, MixedPrecision) and precision.scaler:
                # Fused AdamW takes the loss scale out by itself, but only after the clipping.
                precision.scaler.unscale_(optimizer)
            clip_each(self.parameters(), self.config.optimizer.clip)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        self.after_optimizer_step(step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {
            "version": __version__,
            "method": self.config.name,
            "backbone": self.target.config.model_dump(mode="json"),
            "mean": self.config.views.mean,
            "std": self.config.views.std,
        }


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale each parameter's gradient down to an L2 norm of at most `limit`, one by one (DINO, `clip_gradients`).

    Not the norm of all gradients together: that is another algorithm.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        norms = torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, [torch.clamp(limit / (norm + 1e-6), max=1.0) for norm in norms])


def by_view(views: Tensor) -> Tensor:
    """(B, V, C, H, W) as (V·B, C, H, W), one view after the other."""
    return views.transpose(0, 1).flatten(0, 1)


def make_backbone(config: BackboneConfig, *, drop_path: bool) -> Backbone:
    """A backbone with or without the configured stochastic depth."""
    return Backbone(config if drop_path else config.model_copy(update={"drop_path": 0.0}))
