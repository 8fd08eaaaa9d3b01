"""What DINO and SiT share as Lightning modules: optimizer, schedules, clipping, logging, checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ssl_vit import __version__
from ssl_vit.config.evaluate import FinetuneConfig, FinetuneMethodConfig
from ssl_vit.config.methods import DINOConfig, SiTConfig, ViewsConfig
from ssl_vit.config.pretrain import BackboneConfig, TrainingConfig
from ssl_vit.data.batch import Batch
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.methods.gradient_clipping import FiniteCheck, clip_grad_per_parameter
from ssl_vit.methods.health import HealthCheck, check_feature_std
from ssl_vit.methods.schedules import Schedule, cosine
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import CHECKPOINT_KEY
from ssl_vit.models.feature_statistics import alignment, effective_rank, feature_std, uniformity
from ssl_vit.models.fsdp import apply_fsdp
from ssl_vit.runtime.distributed import all_reduce_mean, gather_from_ranks, norms
from ssl_vit.runtime.step_timer import StepTimer


class TrainingPlan(NamedTuple):
    """The length of a run, in optimizer steps, and what its randomness and learning rate derive from."""

    total_steps: int
    steps_per_epoch: int
    batch_size: int  # global: over all processes and accumulated micro-batches
    log_every: int
    seed: int


def make_plan(config: TrainingConfig | FinetuneConfig, dataset: int) -> TrainingPlan:
    """The run's length in optimizer steps."""
    steps_per_epoch = max(1, dataset // config.data.batch_size)
    total_steps = config.trainer.max_steps or config.trainer.max_epochs * steps_per_epoch
    return TrainingPlan(
        total_steps, steps_per_epoch, config.data.batch_size, config.trainer.log_every_n_steps, config.seed
    )


MethodConfig = DINOConfig | SiTConfig | FinetuneMethodConfig


class StepResult(NamedTuple):
    """What a method makes of a batch."""

    loss: Tensor  # ()
    features: Tensor  # (V, B, D), the [CLS] tokens of the global views, without gradient; their health is logged
    logs: dict[str, Tensor]  # scalars


class SSLMethod(L.LightningModule):
    """A method is a `step`; everything around it is here. All schedules are functions of the optimizer step.

    Args:
        config: Of the method.
        views: That it is given, and their normalization.
        plan: Length of the run.
    """

    finite: Tensor
    check: FiniteCheck  # of the last optimizer step

    def __init__(self, config: MethodConfig, views: ViewsConfig, plan: TrainingPlan) -> None:
        super().__init__()
        self.config = config
        self.views = views
        self.plan = plan
        self.photometric = ColorAugmentation(views)
        self.laps = StepTimer()
        self.logged = torch.empty(0)
        self.register_buffer("finite", torch.ones((), dtype=torch.bool), persistent=False)  # the step's losses so far
        self.warmup_steps = config.optimizer.warmup.steps(plan.steps_per_epoch, plan.total_steps)
        self.schedules = self.make_schedules(config, plan)

    @classmethod
    def make_schedules(cls, config: MethodConfig, plan: TrainingPlan) -> dict[str, Schedule]:
        """The method's schedules by name; they depend on nothing but its configuration and the length of the run.

        Raises:
            ValueError: A warm-up is longer than the run.
        """
        optimizer = config.optimizer
        warmup = optimizer.warmup.steps(plan.steps_per_epoch, plan.total_steps)
        peak = optimizer.lr * plan.batch_size / optimizer.lr_batch_size
        return {
            "lr": cosine(peak, optimizer.min_lr, plan.total_steps, warmup),
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
    @abstractmethod
    def flops(self) -> int:
        """FLOP per image of a training step."""

    def health_checks(self) -> list[HealthCheck]:
        """Return the checks of a row of metrics, most important first."""
        return [check_feature_std]

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.schedules["lr"](self.warmup_steps)

    def after_optimizer_step(self, step: int, taken: Tensor) -> None:
        """Called once per optimizer step, after it; `step` counts from 0, `taken` () bool says if it was not left out.

        `taken` lies on the device: use it there, as to read it would make the device wait.
        """

    def scheduled(self, name: str) -> float:
        """The value of a schedule at the step at hand."""
        return self.schedules[name](self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.laps.lap("other")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            global_views = self.photometric(batch.global_views, batch.key)
            local_views = self.photometric(batch.local_views, batch.key, first_view=batch.global_views.shape[1])
        self.laps.lap("photometrics")
        result = self.step(global_views, local_views, batch)
        self.finite &= result.loss.detach().isfinite()
        if self.at_log_step:
            self.log_step(result, first=batch_idx % self.trainer.accumulate_grad_batches == 0)
        return result.loss

    def log_step(self, result: StepResult, *, first: bool) -> None:
        """Log means over all processes and over the step's micro-batches so far, of which this is the `first`."""
        features = gather_from_ranks(result.features[0])
        logs = {"loss": result.loss.detach(), **result.logs}
        logs |= {"spread": feature_std(features), "effective_rank": effective_rank(features)}
        logs["uniformity"] = uniformity(features)
        if len(result.features) == 2:
            logs["alignment"] = alignment(*result.features)
        values = all_reduce_mean(torch.stack([value.float() for value in logs.values()]))
        self.logged = torch.stack([values]) if first else torch.cat([self.logged, values[None]])  # (micro-batches, n)
        names = [f"train/{name}" for name in logs]
        self.log_dict(dict(zip(names, self.logged.mean(dim=0).unbind(), strict=True)), logger=False)
        self.log_dict({f"schedule/{name}": self.scheduled(name) for name in self.schedules}, logger=False)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(index=batch.index, key=batch.key)  # for the CPU, which then never waits for a GPU

    @property
    def at_log_step(self) -> bool:
        """Whether a row of metrics is written after this step."""
        return (self.global_step + 1) % self.plan.log_every == 0

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # trainer.strategy=fsdp
            for model in self.children():
                if list(model.parameters()):
                    apply_fsdp(model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Optimizer:
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[self.decays(name, parameter)].append(parameter)
        return AdamW(
            [{"params": groups[True], "decays": True}, {"params": groups[False], "decays": False, "weight_decay": 0.0}],
            lr=self.schedules["lr"](0),
            betas=self.config.optimizer.betas,
            fused=True,
        )

    def on_train_start(self) -> None:
        self.laps.start(self.device)

    def on_before_backward(self, loss: Tensor) -> None:
        self.laps.lap("other")

    def on_after_backward(self) -> None:
        self.laps.lap("backward")

    def on_train_batch_end(self, *_: object) -> None:
        self.laps.lap("other")

    def on_train_epoch_start(self) -> None:
        self.laps.lap("other")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.laps.lap("data")
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.scheduled("lr")
            if group["decays"]:
                group["weight_decay"] = self.scheduled("weight_decay")

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: object, **__: object) -> None:
        """Clip each gradient, and leave the step out, in all processes, if a number is not finite in one."""
        precision = self.trainer.precision_plugin
        scaler = precision.scaler if isinstance(precision, MixedPrecision) else None
        if scaler:
            # Fused AdamW takes the loss scale out by itself, but only after the clipping.
            scaler.unscale_(optimizer)
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        sizes = norms(list(gradients.values()))
        loss_scale = scaler.get_scale() if scaler else None
        self.check = FiniteCheck(list(gradients), sizes, self.finite, loss_scale=loss_scale)
        self.finite.fill_(True)
        if self.config.optimizer.grad_clip:
            clip_grad_per_parameter(list(gradients.values()), sizes, self.config.optimizer.grad_clip)
        optimizer.found_inf = (~self.check.taken).float()  # type: ignore[attr-defined] # fused AdamW then does nothing
        if scaler and self.check.skipped():  # which has a mark of its own there
            optimizer.zero_grad()
        self.laps.lap("clip")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        self.laps.lap("optimizer")
        self.after_optimizer_step(step, self.check.taken)
        self.laps.lap("ema")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Resumed at the end of an epoch, Lightning 2.6 counts the next one as not begun, and a checkpoint of its end
        # would repeat it. The counts follow from the step.
        epoch = (self.global_step - 1) // self.plan.steps_per_epoch  # that the last step belongs to
        counts = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
        for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            progress.update(counts)
        checkpoint[CHECKPOINT_KEY] = {
            "version": __version__,
            "method": self.config.name,
            "backbone": self.target.config.model_dump(mode="json"),
            "mean": self.views.mean,
            "std": self.views.std,
        }


def stack_views(views: Tensor) -> Tensor:
    """(B, V, C, H, W) as (V·B, C, H, W), one view after the other."""
    return views.transpose(0, 1).flatten(0, 1)


def make_backbone(config: BackboneConfig, *, drop_path: bool) -> Backbone:
    """A backbone with or without the configured stochastic depth."""
    return Backbone(config if drop_path else config.model_copy(update={"drop_path": 0.0})).require_cls()
