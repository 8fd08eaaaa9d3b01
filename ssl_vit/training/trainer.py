"""Lightning's Trainer and module, set up for us: devices, precision, the way processes share the work, no chatter."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from ssl_vit.config.evaluate import FinetuneConfig
from ssl_vit.config.pretrain import TrainerConfig, TrainingConfig
from ssl_vit.methods import METHODS
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.device import autocast_dtype, best_device, prefer_compile, prefer_fused_attention
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import disable_malloc_trim
from ssl_vit.training.checkpointing import AtomicCheckpointIO


def build_method(config: TrainingConfig, plan: TrainingPlan) -> SSLMethod:
    """The Lightning module, its backbones in the form that the device is good at."""
    torch.manual_seed(config.seed)
    try:
        method = METHODS[config.method.name](config.method, config.backbone, plan)  # type: ignore[arg-type]
    except ValueError as error:  # of the schedules: a warm-up longer than the run
        raise UserError(f"method.{config.method.name}: {error}") from None
    configure_backbones(method, config.trainer)
    return method


def configure_backbones(method: SSLMethod, settings: TrainerConfig) -> None:
    """Bring the backbones of a method into the form that the device is good at."""
    device = best_device(settings.accelerator)
    fused = prefer_fused_attention(device) if settings.fused_attention == "auto" else settings.fused_attention
    compiled = prefer_compile(device) if settings.compile == "auto" else settings.compile
    for backbone in (module for module in method.modules() if isinstance(module, Backbone)):
        backbone.set_fused_attention(fused)
        if compiled:
            backbone.compile_blocks()
        if settings.activation_checkpointing:
            backbone.enable_activation_checkpointing()


def build_trainer(
    config: TrainingConfig | FinetuneConfig,
    plan: TrainingPlan,
    loggers: list[Logger],
    callbacks: list[L.Callback],
    files: AtomicCheckpointIO,
    folder: Path,
) -> L.Trainer:
    """Lightning's Trainer for a run in `folder`; checkpoints, progress and stopping are the callbacks' work."""
    settings = config.trainer
    device = best_device(settings.accelerator)
    if device.type == "cuda" and settings.devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices={settings.devices}: this machine has {torch.cuda.device_count()} GPUs")
    if device.type == "cpu":
        disable_malloc_trim()
    if device.type == "cpu" and settings.devices > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.devices))
    precision = settings.precision
    if precision == "auto":
        precision = "bf16-mixed" if autocast_dtype(device) else "32-true"
    plugins: list[Any] = [files]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # the signals are ours: training/signals.py
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=make_strategy(settings, device),
        precision=precision,
        max_steps=plan.total_steps,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        log_every_n_steps=settings.log_every_n_steps,
        logger=loggers,
        callbacks=callbacks,
        plugins=plugins,
        default_root_dir=folder,
        use_distributed_sampler=False,  # the loader slices each global batch itself
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def make_strategy(settings: TrainerConfig, device: torch.device) -> Strategy | str:
    """How the processes share the work: each with the whole model, or with a part of it."""
    processes = settings.devices * settings.num_nodes
    # The CPUs talk among themselves as well, so that they can agree without waiting for their GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if settings.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
    return _DDP(process_group_backend=backend, gradient_as_bucket_view=True) if processes > 1 else "auto"


class _DDP(DDPStrategy):
    def determine_ddp_device_ids(self) -> None:
        """None: Lightning has moved the batch. Torch would move its keys to the GPU as well, and the CPU wait there."""


def silence_lightning() -> None:
    """Keep Lightning's hints for its own users off the terminal."""
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
