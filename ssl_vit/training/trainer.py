"""Build the method and Lightning's Trainer: devices, precision, strategy, no output of Lightning's own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from ssl_vit.config.pretrain import TrainerConfig, TrainingConfig
from ssl_vit.methods import METHODS
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.device import autocast_dtype, best_device, prefer_compile, prefer_fused_attention
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import disable_malloc_trim
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.checkpointing import AtomicCheckpointIO


def build_method(
    config: TrainingConfig, plan: TrainingPlan, prepare: Callable[[SSLMethod], None] = lambda method: None
) -> SSLMethod:
    """Build the Lightning module; `prepare` may change it before its backbones are configured for the device.

    Raises:
        UserError: The schedules do not fit the length of the run.
    """
    torch.manual_seed(config.seed)
    try:
        method = METHODS[config.method.name](config.method, config.backbone, plan)  # type: ignore[arg-type]
        prepare(method)
    except ValueError as error:  # a warm-up longer than the run
        raise UserError(f"method.{config.method.name}: {error}") from None
    configure_backbones(method, config.trainer)
    return method


def configure_backbones(method: SSLMethod, config: TrainerConfig) -> None:
    """Select attention kernel, compilation and activation checkpointing for the device."""
    device = best_device(config.accelerator)
    fused = prefer_fused_attention(device) if config.fused_attention == "auto" else config.fused_attention
    compiled = prefer_compile(device) if config.compile == "auto" else config.compile
    for backbone in (module for module in method.modules() if isinstance(module, Backbone)):
        backbone.set_fused_attention(fused)
        if compiled:
            backbone.compile_blocks()
        if config.activation_checkpointing:
            backbone.enable_activation_checkpointing()


def build_trainer(
    config: TrainerConfig,
    plan: TrainingPlan,
    loggers: list[Logger],
    callbacks: list[L.Callback],
    io: AtomicCheckpointIO,
    folder: Path,
) -> L.Trainer:
    """Build Lightning's Trainer; checkpoints, progress and stopping are up to the callbacks.

    Raises:
        UserError: The machine has fewer GPUs than `trainer.devices`.
    """
    device = best_device(config.accelerator)
    if device.type == "cuda" and config.devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices={config.devices}: this machine has {torch.cuda.device_count()} GPUs")
    if device.type == "cpu":
        disable_malloc_trim()
    if device.type == "cpu" and config.devices > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.devices))
    plugins: list[Any] = [io]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # PreemptionHandler requeues
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=make_strategy(config, device),
        precision=resolve_precision(config, device),
        max_steps=plan.total_steps,
        accumulate_grad_batches=config.accumulate_grad_batches,
        log_every_n_steps=config.log_every_n_steps,
        logger=loggers,
        callbacks=callbacks,
        plugins=plugins,
        default_root_dir=folder,
        use_distributed_sampler=False,  # the loader slices each global batch itself
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def resolve_precision(config: TrainerConfig, device: torch.device) -> Any:  # noqa: ANN401 - one of Lightning's names
    """Return the precision; `auto` is bfloat16 where the device computes in it, else float32."""
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if autocast_dtype(device) else "32-true"


def describe_computation(config: TrainerConfig) -> str:
    """Return on what and in which precision a run computes, after `auto` is resolved."""
    device = best_device(config.accelerator)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    processes = pluralize(config.devices * config.num_nodes, "process", "processes")
    return f"computed on {name}, {processes}, {resolve_precision(config, device)}"


def make_strategy(config: TrainerConfig, device: torch.device) -> Strategy | str:
    """Return the strategy: a whole model in each process (DDP), or a part of it (FSDP2)."""
    processes = config.devices * config.num_nodes
    # gloo for the CPUs as well, so that they can agree without waiting for their GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if config.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
    return _DDP(process_group_backend=backend, gradient_as_bucket_view=True) if processes > 1 else "auto"


class _DDP(DDPStrategy):
    def determine_ddp_device_ids(self) -> None:
        """Return None, as Lightning has moved the batch: torch would move its keys too, and make the CPU wait."""


def silence_lightning() -> None:
    """Hide Lightning's hints for its own users."""
    for part in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(part).setLevel(logging.WARNING)
    for hint in (
        "Found .* module.s. in eval mode",  # the teacher
        "`isinstance.treespec, LeafSpec",
        "The 'train_dataloader' does not have many workers",
        "The number of training batches",
        "You're resuming from a checkpoint that ended before the epoch ended",  # the loader starts at the right step
        "torch.distributed.nn.functional.all_gather is deprecated",
    ):
        warnings.filterwarnings("ignore", hint)
