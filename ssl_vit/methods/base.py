"""The base class of all methods: optimizer, schedules, gradient clipping, logging, checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer

from ssl_vit import __version__
from ssl_vit.config.evaluate import FinetuneMethodConfig
from ssl_vit.config.methods import MethodConfig, OptimizerConfig, ViewsConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.config.types import AUTO_RANGE
from ssl_vit.data.batch import Batch
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.methods.anchor import Anchor
from ssl_vit.methods.backbone_rates import BackboneRates
from ssl_vit.methods.flops import Flops, count_flops, count_forward_flops
from ssl_vit.methods.gradient_clipping import FiniteCheck, clip_grad_per_parameter
from ssl_vit.methods.health import HealthCheck, check_feature_std
from ssl_vit.methods.schedules import Schedule, TrainingPlan, cosine
from ssl_vit.methods.step_result import ImageRestorer, PretextViews, StepResult
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import CHECKPOINT_KEY, set_epoch_counts
from ssl_vit.models.feature_statistics import alignment, effective_rank, feature_std, uniformity
from ssl_vit.runtime.distributed import all_reduce_mean, gather_from_ranks, norms
from ssl_vit.runtime.step_timer import StepTimer

BACKBONE = "student.backbone."  # before the names of the trained backbone's parameters


class SSLMethod(L.LightningModule):
    """Base class of methods, which define `step`, `forward` and `eval_backbone`.

    The trained model is called `student` and its moving average, if there is one, `teacher`; both have a `backbone`.
    Checkpoints are read by these names. All schedules are functions of the optimizer step.
    """

    losses_finite: Tensor
    check: FiniteCheck  # of the last optimizer step
    flops: Flops  # per image; counted before training

    def __init__(self, config: MethodConfig | FinetuneMethodConfig, views: ViewsConfig, plan: TrainingPlan) -> None:
        super().__init__()
        self.config = config
        self.views = views
        self.plan = plan
        self.color_augmentation = ColorAugmentation(views)
        self.rates: BackboneRates | None = None  # of a run that starts from weights, as `anchor`; see `continuation`
        self.anchor: Anchor | None = None
        self.value_range = AUTO_RANGE  # that the images are decoded with, for the checkpoints
        self.timer = StepTimer()
        self.logged = torch.empty(0)
        self.register_buffer("losses_finite", torch.ones((), dtype=torch.bool), persistent=False)  # so far in the step
        self.warmup_steps = config.optimizer.warmup.steps(plan.steps_per_epoch, plan.total_steps)
        self.schedules = self.make_schedules(config, plan)

    @classmethod
    def make_schedules(cls, config: Any, plan: TrainingPlan) -> dict[str, Schedule]:  # noqa: ANN401 - the method's own
        """Return the schedules by name; they depend only on the configuration and the length of the run.

        Raises:
            ValueError: A warm-up is longer than the run.
        """
        optimizer: OptimizerConfig = config.optimizer
        warmup = optimizer.warmup.steps(plan.steps_per_epoch, plan.total_steps)
        peak = optimizer.lr * plan.batch_size / optimizer.lr_batch_size
        return {
            "lr": cosine(peak, optimizer.min_lr, plan.total_steps, warmup),
            "weight_decay": cosine(*optimizer.weight_decay, plan.total_steps),
        }

    @abstractmethod
    def step(self, global_views: Tensor, local_views: Tensor, batch: Batch) -> StepResult:
        """Compute the loss of float views (B, G, C, H, W) and (B, L, C, h, w)."""

    @abstractmethod
    def forward(self, global_views: Tensor, local_views: Tensor) -> Sequence[Tensor]:
        """Compute the models' outputs on the views of a step, without augmentation and losses, to count their FLOPs."""

    @property
    @abstractmethod
    def eval_backbone(self) -> Backbone:
        """The backbone to evaluate and export."""

    def has_weight_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: to all but biases, one-dimensional parameters, positions and tokens."""
        return parameter.ndim > 1 and not name.endswith((".bias", "pos_embed", "cls_token", "reg_token"))

    def health_checks(self) -> list[HealthCheck]:
        """Return the checks of a row of metrics, most important first."""
        return [check_feature_std]

    def figures(self) -> dict[str, ImageRestorer]:
        """Return what a run can draw besides attention, by the name of the figure."""
        return {}

    @classmethod
    def load_figures(cls, checkpoint: Path, config: Any, backbone: BackboneConfig) -> dict[str, ImageRestorer]:  # noqa: ANN401
        """Return `figures` of a run directory or of one of its `.ckpt` files; empty if the file lacks the models.

        Raises:
            UserError: The file is damaged or does not fit the configuration.
        """
        return {}

    @classmethod
    def pretext_views(cls, config: Any, global_views: Tensor, key: Tensor) -> PretextViews | None:  # noqa: ANN401
        """Return input and target of the model for views (B, G, C, S, S), if they are more than the views."""
        return None

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        return self.schedules["lr"](self.warmup_steps)

    def after_optimizer_step(self, step: int, applied: Tensor) -> None:
        """Update what follows the trained parameters, such as a teacher, after each optimizer step, from 0.

        `applied` () bool is False if it was skipped; it is on the device, where reading it would make the CPU wait.
        """

    def scheduled(self, name: str) -> float:
        """Return the value of a schedule at the current optimizer step."""
        return self.schedules[name](self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.timer.mark("other")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            global_views = self.color_augmentation(batch.global_views, batch.key)
            local_views = self.color_augmentation(batch.local_views, batch.key, first_view=batch.global_views.shape[1])
        self.timer.mark("augmentation")
        result = self.step(global_views, local_views, batch)
        if self.anchor:
            term = self.anchor(self.get_submodule("student.backbone"), result.student)
            loss = result.loss + self.anchor.config.weight * term
            result = result._replace(loss=loss, logs={**result.logs, "anchor": term.detach()})
            self.timer.mark("anchor")
        self.losses_finite &= result.loss.detach().isfinite()
        if self.should_log:
            self.log_step(result, first=batch_idx % self.trainer.accumulate_grad_batches == 0)
        return result.loss

    def log_step(self, result: StepResult, *, first: bool) -> None:
        """Log means over all processes and over the micro-batches of the step so far, of which this is the `first`."""
        features = gather_from_ranks(result.features[0])
        logs = {"loss": result.loss.detach(), **result.logs}
        logs |= {"feature_std": feature_std(features), "effective_rank": effective_rank(features)}
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
        return moved._replace(index=batch.index, key=batch.key)  # stay on the CPU, to avoid a device sync

    @property
    def should_log(self) -> bool:
        """Whether a row of metrics is written after the current step."""
        return (self.global_step + 1) % self.plan.log_every == 0

    def setup(self, stage: str) -> None:
        self.flops = self.count_flops()  # before FSDP takes the parameters apart

    def count_flops(self) -> Flops:
        """Count the floating-point operations of a training step per image."""
        channels, crops = self.eval_backbone.config.in_chans, (self.views.global_crops, self.views.local_crops)
        shapes = [(each.count, channels, each.size, each.size) for each in crops]
        flops = count_flops(self, *[(1, *shape) for shape in shapes])
        if self.anchor and self.anchor.compares_tokens:
            flops.backbones["anchor"] = count_forward_flops(self.anchor.backbone, shapes[0])
        return flops

    def configure_model(self) -> None:
        """Shard the models with trainer.strategy=fsdp (FSDP2, experimental): block by block, then the rest.

        Weights are gathered only while their part computes; outside `forward`, parameters are the shards of this
        process. A model without a backbone is small and stays gathered from its forward to its backward pass.
        """
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        for model in self.children():
            backbones = [module for module in model.modules() if isinstance(module, Backbone)]
            for backbone in backbones:
                backbone.shard_blocks(mesh)
            if list(model.parameters()):
                # A teacher has no backward pass that would reshard it.
                fully_shard(model, mesh=mesh, reshard_after_forward=bool(backbones))

    def configure_optimizers(self) -> Optimizer:
        groups: dict[tuple[bool, float | None], list[nn.Parameter]] = {(True, None): [], (False, None): []}
        scales = self.rates.scales if self.rates else {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                scale = scales.get(name.removeprefix(BACKBONE))
                groups.setdefault((self.has_weight_decay(name, parameter), scale), []).append(parameter)
        return AdamW(
            [
                {"params": parameters, "decays": decays, "scale": scale} | ({} if decays else {"weight_decay": 0.0})
                for (decays, scale), parameters in groups.items()
            ],
            lr=self.schedules["lr"](0),
            betas=self.config.optimizer.betas,
            fused=True,
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.rates and self.global_step < self.rates.frozen_steps:
            for parameter in self.get_submodule("student.backbone").parameters():
                parameter.grad = None  # not requires_grad: that would change the graph under DDP

    def on_train_start(self) -> None:
        self.timer.start(self.device)

    def _mark_other(self, *_: Any, **__: Any) -> None:
        self.timer.mark("other")

    on_train_epoch_start = on_before_backward = on_train_batch_end = _mark_other

    def on_after_backward(self) -> None:
        self.timer.mark("backward")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.timer.mark("data")
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.scheduled("lr")
            if self.rates and group["scale"] is not None:
                group["lr"] *= group["scale"] * self.rates.factor(self.global_step)
            if group["decays"]:
                group["weight_decay"] = self.scheduled("weight_decay")

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: object, **__: object) -> None:
        """Clip each gradient, and skip the step in all processes if a number is not finite in one of them."""
        precision = self.trainer.precision_plugin
        scaler = precision.scaler if isinstance(precision, MixedPrecision) else None
        if scaler:
            # Fused AdamW divides by the loss scale itself, but only after the clipping.
            scaler.unscale_(optimizer)
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        gradient_norms = norms(list(gradients.values()))
        loss_scale = scaler.get_scale() if scaler else None
        self.check = FiniteCheck(list(gradients), gradient_norms, self.losses_finite, loss_scale=loss_scale)
        self.losses_finite.fill_(True)
        if self.config.optimizer.grad_clip:
            clip_grad_per_parameter(list(gradients.values()), gradient_norms, self.config.optimizer.grad_clip)
        optimizer.found_inf = (~self.check.applied).float()  # type: ignore[attr-defined] # fused AdamW then skips
        if scaler and self.check.skipped():  # the scaler sets found_inf itself
            optimizer.zero_grad()
        self.timer.mark("clip")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        self.timer.mark("optimizer")
        self.after_optimizer_step(step, self.check.applied)
        self.timer.mark("ema")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        set_epoch_counts(checkpoint, self.global_step, self.plan.steps_per_epoch)
        checkpoint[CHECKPOINT_KEY] = {
            "version": __version__,
            "method": self.config.name,
            "backbone": self.eval_backbone.config.model_dump(mode="json"),
            "mean": self.views.mean,
            "std": self.views.std,
            "value_range": str(self.value_range),
        }


def stack_views(views: Tensor) -> Tensor:
    """Reshape (B, V, C, H, W) to (V·B, C, H, W), one view after the other."""
    return views.transpose(0, 1).flatten(0, 1)


def make_backbone(config: BackboneConfig, *, drop_path: bool) -> Backbone:
    """Build a backbone with a class token, with or without the configured stochastic depth."""
    return Backbone(config if drop_path else config.model_copy(update={"drop_path": 0.0})).require_cls()
