"""`ssl-vit pretrain`: from a folder of pictures to a run folder with a backbone that bare timm loads."""

from __future__ import annotations

import logging
import uuid
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, WandbLogger

from ssl_vit.commands.compose import load_config
from ssl_vit.config import PretrainConfig
from ssl_vit.data.find import find_pictures
from ssl_vit.data.loading import training_loader
from ssl_vit.data.pictures import SkippedPictures
from ssl_vit.distributed import first_process
from ssl_vit.errors import UserError
from ssl_vit.methods import METHODS
from ssl_vit.methods.base import Plan, SSLMethod
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.weights import export_backbone
from ssl_vit.training.hardware import autocast_dtype, best_device, fused_attention_pays
from ssl_vit.training.health import AFTER_DIVERGENCE, CollapseMonitor
from ssl_vit.training.keeper import Keeper
from ssl_vit.training.metrics import MetricsCSV
from ssl_vit.training.online_knn import OnlineKNN
from ssl_vit.training.progress import RunProgress
from ssl_vit.training.runs import begin_run, open_run, steps_done
from ssl_vit.transforms.crops import MultiCrop


def main(words: list[str]) -> None:
    """Run the command."""
    pretrain(load_config("pretrain", words, PretrainConfig))


def pretrain(config: PretrainConfig) -> Path:
    """Train, export, and return the run folder.

    Raises:
        UserError: Of the configuration, the pictures or the run folder, before any training; or training diverged.
    """
    quiet_lightning()
    pictures = find_pictures(config.data.source, config.data.root)
    plan = make_plan(config, len(pictures))
    method = build_method(config, plan)
    checkpoint = open_run(config, first_process=first_process())
    done = steps_done(checkpoint)
    folder = config.run.path
    skipped = SkippedPictures(folder / "skipped.txt")

    keeper = Keeper(
        folder / "checkpoints",
        every=config.trainer.checkpoint_every,
        max_time=config.trainer.max_time,
        keep_every_epochs=config.trainer.keep_every_epochs,
    )
    monitor = CollapseMonitor(method.prototypes, first_step=method.warmup_steps, every=plan.log_every)
    progress = RunProgress(plan.total_steps, plan.batch_size, every=plan.log_every)
    online_knn = OnlineKNN(config, pictures, skipped)
    trainer = make_trainer(config, plan, make_loggers(config, done), [progress, monitor, online_knn, keeper])
    loader = training_loader(
        pictures,
        MultiCrop(config.method.views),
        config.data,
        seed=config.seed,
        channels=config.backbone.in_chans,
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=config.trainer.accumulate,
        first_step=done,
        skipped=skipped,
        local_world=config.trainer.devices,
    )
    if trainer.is_global_zero:
        begin_run(config)
        print(introduction(config, plan, len(pictures), method))
        if done:
            print(f"Going on after step {done:,}" if done < plan.total_steps else "The run is complete already")
    trainer.fit(method, loader, ckpt_path=checkpoint, weights_only=True)
    if keeper.diverged:
        raise UserError(
            f"diverged: the loss is not finite at step {trainer.global_step:,}. {keeper.folder} keeps what was saved "
            f"before. {AFTER_DIVERGENCE}"
        )

    if trainer.is_global_zero:
        views = config.method.views
        source = f"{folder} after {trainer.global_step} steps"
        export_backbone(method.target, folder / "backbone.safetensors", mean=views.mean, std=views.std, source=source)
        print(conclusion(folder, trainer.global_step, plan, monitor, skipped))
    return folder


def make_plan(config: PretrainConfig, pictures: int) -> Plan:
    """The run's length in optimizer steps."""
    steps_per_epoch = max(1, pictures // config.data.batch_size)
    total_steps = config.trainer.max_steps or config.trainer.max_epochs * steps_per_epoch
    return Plan(total_steps, steps_per_epoch, config.data.batch_size, config.trainer.log_every, config.seed)


def build_method(config: PretrainConfig, plan: Plan) -> SSLMethod:
    """The Lightning module, its attention in the form that the device is good at."""
    torch.manual_seed(config.seed)
    try:
        method = METHODS[config.method.name](config.method, config.backbone, plan)  # type: ignore[arg-type]
    except ValueError as error:  # of the schedules: a warm-up longer than the run
        raise UserError(f"method.{config.method.name}: {error}") from None
    fused = config.trainer.fused_attention
    for module in method.modules():
        if isinstance(module, Backbone):
            module.set_fused_attention(
                fused_attention_pays(best_device(config.trainer.accelerator)) if fused == "auto" else fused
            )
    return method


def make_trainer(config: PretrainConfig, plan: Plan, loggers: list[Logger], callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's Trainer; checkpoints, progress and stopping are the callbacks' work."""
    settings = config.trainer
    device = best_device(settings.accelerator)
    if device.type == "cuda" and settings.devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices={settings.devices}: this machine has {torch.cuda.device_count()} GPUs")
    processes = settings.devices * settings.nodes
    if device.type == "cpu" and settings.devices > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.devices))
    precision = settings.precision
    if precision == "auto":
        precision = "bf16-mixed" if autocast_dtype(device) else "32-true"
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy="ddp" if processes > 1 else "auto",
        precision=precision,
        max_steps=plan.total_steps,
        accumulate_grad_batches=settings.accumulate,
        log_every_n_steps=settings.log_every,
        logger=loggers,
        callbacks=callbacks,
        default_root_dir=config.run.path,
        use_distributed_sampler=False,  # the loader slices each global batch itself
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def make_loggers(config: PretrainConfig, done: int) -> list[Logger]:
    """metrics.csv always; wandb beside it, with the run's id kept in the run folder."""
    folder = config.run.path
    loggers: list[Logger] = [MetricsCSV(folder / "metrics.csv", done)]
    if config.logger.name == "wandb":
        id_file = folder / "wandb_id.txt"
        if first_process() and not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        wandb = WandbLogger(
            project=config.logger.project,
            name=config.run.name,
            id=id_file.read_text(encoding="utf-8") if first_process() else None,
            resume="allow",
            save_dir=folder,
            offline=config.logger.offline,
        )
        wandb.log_hyperparams(config.model_dump(mode="json"))
        loggers.append(wandb)
    return loggers


def introduction(config: PretrainConfig, plan: Plan, pictures: int, method: SSLMethod) -> str:
    """What is about to happen: data, network, length, and the schedules along the run."""
    size = sum(parameter.numel() for parameter in method.target.parameters()) / 1e6
    optimizer = config.method.optimizer
    lines = [
        f"{pictures:,} pictures, {plan.batch_size} per step, {plan.steps_per_epoch:,} steps per epoch, "
        f"{plan.total_steps:,} steps in all",
        f"{config.method.name} on {config.backbone.name}, {size:.1f} M parameters, run folder {config.run.path}",
        f"learning rate {optimizer.lr:g} x {plan.batch_size}/{optimizer.lr_batch_size} = {method.peak_lr:.3g}",
    ]
    points = [round(share * (plan.total_steps - 1)) for share in (0, 0.1, 0.5, 1)]
    lines.append(f"  {'at step':<20}" + "".join(f"{point:>10,}" for point in points))
    for name, schedule in method.schedules.items():
        lines.append(f"  {name:<20}" + "".join(f"{schedule(point):>10.3g}" for point in points))
    return "\n".join(lines)


def conclusion(folder: Path, step: int, plan: Plan, monitor: CollapseMonitor, skipped: SkippedPictures) -> str:
    """Where things are, and whatever was not as it should be."""
    lines = []
    if step < plan.total_steps:
        lines.append(
            f"Stopped and saved after step {step:,} of {plan.total_steps:,}; the same command with "
            "run.resume=true goes on from there."
        )
    if monitor.verdict:
        lines.append(f"Health: {monitor.verdict}")
    if count := skipped.count():
        pictures = "picture" if count == 1 else "pictures"
        lines.append(f"{count} {pictures} could not be read and left out: {skipped.path} names them")
    lines.append(f"Backbone: {folder / 'backbone.safetensors'} ({folder / 'backbone.json'} says how to load it)")
    return "\n".join(lines)


def quiet_lightning() -> None:
    """Keep Lightning's hints for its own users off the terminal."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for hint in (
        "Found .* module.s. in eval mode",  # the teacher
        "`isinstance.treespec, LeafSpec",
        "The 'train_dataloader' does not have many workers",
        "The number of training batches",
        "You're resuming from a checkpoint that ended before the epoch ended",  # the loader starts at the right step
        "torch.distributed.nn.functional.all_gather is deprecated",
    ):
        warnings.filterwarnings("ignore", hint)
