"""`ssl-vit pretrain`: from a folder of images to a run folder with a backbone that bare timm loads."""

from __future__ import annotations

import uuid
from pathlib import Path

from lightning.pytorch.loggers import Logger

from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.loading.loader import build_train_loader
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.schedules import TrainingPlan, make_plan
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.distributed import shutdown_process_group
from ssl_vit.runtime.jsonl import JSONLWriter
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.training.callbacks.consistency_check import ConsistencyCheck
from ssl_vit.training.callbacks.health_monitor import HealthMonitor
from ssl_vit.training.callbacks.image_logger import ImageLogger
from ssl_vit.training.callbacks.online_eval import OnlineEval
from ssl_vit.training.callbacks.preemption import PreemptionHandler
from ssl_vit.training.callbacks.progress_bar import TrainingProgressBar
from ssl_vit.training.callbacks.run_checkpoint import RunCheckpoint
from ssl_vit.training.callbacks.skipped_steps import SkippedSteps
from ssl_vit.training.config_check import check_config
from ssl_vit.training.console import final_summary, startup_summary
from ssl_vit.training.failures import raise_if_diverged, translate_training_errors
from ssl_vit.training.loggers import ResumableCSVLogger, ResumableWandbLogger
from ssl_vit.training.run_dir import AnyRun, RunState, apply_extension, lock_run_dir, open_run_dir, write_run_metadata
from ssl_vit.training.trainer import build_method, build_trainer, silence_lightning


def main(config: PretrainConfig) -> None:
    """Run the command."""
    pretrain(config)


def pretrain(config: PretrainConfig, dataset: ImageDataset | None = None) -> Path:
    """Train, export, and return the run folder.

    Raises:
        UserError: Of the configuration, the images or the run folder, before any training; or training failed.
    """
    silence_lightning()
    config = apply_extension(config)
    dataset = dataset or build_dataset(config.data.source, config.data.root)
    plan = make_plan(config, len(dataset))
    method = build_method(config, plan)
    with lock_run_dir(config.run):
        start = open_run_dir(config, dataset)
        if len(start.dataset) != len(dataset):  # run.keep_image_list
            plan = make_plan(config, len(start.dataset))
            method = build_method(config, plan)
        return train(config, plan, method, start)


def train(config: PretrainConfig, plan: TrainingPlan, method: SSLMethod, start: RunState) -> Path:
    """From the start to the end of the run, or to where it is stopped."""
    folder = config.run.path
    skipped = SkippedImageLog(folder / "skipped_images.txt")
    signals = PreemptionHandler()
    online = OnlineEval(config, start, skipped)
    keeper = RunCheckpoint(folder / "checkpoints", signals, lambda: online.improved, config.trainer)
    steps = SkippedSteps(
        JSONLWriter(folder / "skipped_steps.jsonl", start.done), start.dataset, budget=config.trainer.max_skipped_steps
    )
    verdicts = check_config(config.method, plan, method.peak_lr)
    health = HealthMonitor(
        method.health_checks(),
        JSONLWriter(folder / "health.jsonl", start.done),
        config_warnings=verdicts,
        first_step=method.warmup_steps,
        every=plan.log_every,
    )
    progress = TrainingProgressBar(plan.total_steps, plan.batch_size, every=plan.log_every)
    panels = ImageLogger(config, plan, start, skipped)
    callbacks = [signals, ConsistencyCheck(config, start), steps, progress, health, online, keeper, panels]
    trainer = build_trainer(config, plan, make_loggers(config, start.done), callbacks, keeper.files, folder)
    loader = build_train_loader(
        start.dataset,
        MultiCrop(config.method.views),
        config.data,
        seed=config.seed,
        channels=config.backbone.in_chans,
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=config.trainer.accumulate_grad_batches,
        first_step=start.done,
        skipped=skipped,
        local_world=config.trainer.devices,
        device=trainer.strategy.root_device,
    )
    if trainer.is_global_zero:
        write_run_metadata(config, start.dataset)
        print(startup_summary(config, plan, method, start, verdicts, online), flush=True)
    with translate_training_errors(keeper):
        trainer.fit(method, loader, ckpt_path=start.checkpoint, weights_only=True)
    shutdown_process_group()
    raise_if_diverged(keeper, steps, trainer.global_step)

    if trainer.is_global_zero:
        views = config.method.views
        source = f"{folder} after {trainer.global_step} steps"
        # From the checkpoint: with fsdp no process has the whole model.
        target = load_backbone(str(folder)).backbone
        export_backbone(target, folder / "backbone.safetensors", mean=views.mean, std=views.std, source=source)
        said = [*online.summary(), *panels.summary()]
        print(final_summary(folder, trainer.global_step, plan, health.current, steps, skipped, said))
        if outcome := signals.pass_on():
            print(outcome)
    return folder


def make_loggers(config: AnyRun, done: int) -> list[Logger]:
    """metrics.csv always; wandb beside it, with the run's id kept in the run folder."""
    folder = config.run.path
    metrics = ResumableCSVLogger(folder / "metrics.csv", done)
    loggers: list[Logger] = [metrics]
    if config.logger.name == "wandb":
        id_file = folder / "wandb_id.txt"
        if is_rank_zero() and not (id_file.exists() and id_file.read_text(encoding="utf-8")):
            with atomic_write(id_file) as file:
                file.write(uuid.uuid4().hex[:8].encode())
        wandb = ResumableWandbLogger(
            behind=metrics.latest,
            project=config.logger.project,
            name=config.run.name,
            id=id_file.read_text(encoding="utf-8") if is_rank_zero() else None,
            resume="allow",
            save_dir=folder,
            mode="offline" if config.logger.offline else None,
        )
        wandb.log_hyperparams(config.model_dump(mode="json"))
        loggers.append(wandb)
    return loggers
