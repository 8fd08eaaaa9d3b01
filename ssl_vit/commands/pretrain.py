"""`ssl-vit pretrain`: from a folder of pictures to a run folder with a backbone that bare timm loads."""

from __future__ import annotations

import uuid
from pathlib import Path

from lightning.pytorch.loggers import Logger

from ssl_vit.config import PretrainConfig
from ssl_vit.data.find import find_pictures
from ssl_vit.data.loading import training_loader
from ssl_vit.data.pictures import SkippedPictures
from ssl_vit.distributed import disband
from ssl_vit.durable import durable
from ssl_vit.methods.base import Plan, SSLMethod, make_plan
from ssl_vit.models.weights import export_backbone, load_backbone
from ssl_vit.processes import first_process
from ssl_vit.training.agreement import SameStart
from ssl_vit.training.faults import named_faults, refuse_divergence
from ssl_vit.training.health import HealthMonitor
from ssl_vit.training.journal import Journal
from ssl_vit.training.keeper import Keeper
from ssl_vit.training.metrics import MetricsCSV, Wandb
from ssl_vit.training.online import OnlineEvaluation
from ssl_vit.training.outlook import outlook
from ssl_vit.training.panels import Panels
from ssl_vit.training.progress import RunProgress
from ssl_vit.training.report import conclusion, introduction
from ssl_vit.training.runs import AnyRun, Start, begin_run, locked, open_run, with_extension
from ssl_vit.training.signals import StopSignals
from ssl_vit.training.skipping import SkippedSteps
from ssl_vit.training.trainer import build_method, make_trainer, quiet_lightning
from ssl_vit.transforms.crops import MultiCrop


def main(config: PretrainConfig) -> None:
    """Run the command."""
    pretrain(config)


def pretrain(config: PretrainConfig) -> Path:
    """Train, export, and return the run folder.

    Raises:
        UserError: Of the configuration, the pictures or the run folder, before any training; or training failed.
    """
    quiet_lightning()
    config = with_extension(config)
    pictures = find_pictures(config.data.source, config.data.root)
    plan = make_plan(config, len(pictures))
    method = build_method(config, plan)
    with locked(config.run):
        start = open_run(config, pictures)
        if len(start.pictures) != len(pictures):  # run.keep_pictures
            plan = make_plan(config, len(start.pictures))
            method = build_method(config, plan)
        return train(config, plan, method, start)


def train(config: PretrainConfig, plan: Plan, method: SSLMethod, start: Start) -> Path:
    """From the start to the end of the run, or to where it is stopped."""
    folder = config.run.path
    skipped = SkippedPictures(folder / "skipped.txt")
    signals = StopSignals()
    online = OnlineEvaluation(config, start, skipped)
    keeper = Keeper(folder / "checkpoints", signals, lambda: online.improved, config.trainer)
    steps = SkippedSteps(
        Journal(folder / "skipped_steps.jsonl", start.done), start.pictures, budget=config.trainer.skip_budget
    )
    health = HealthMonitor(
        method.prototypes,
        Journal(folder / "health.jsonl", start.done),
        first_step=method.warmup_steps,
        every=plan.log_every,
    )
    progress = RunProgress(plan.total_steps, plan.batch_size, every=plan.log_every)
    panels = Panels(config, plan, start, skipped)
    callbacks = [signals, SameStart(config, start), steps, progress, health, online, keeper, panels]
    trainer = make_trainer(config, plan, make_loggers(config, start.done), callbacks, keeper.files, folder)
    loader = training_loader(
        start.pictures,
        MultiCrop(config.method.views),
        config.data,
        seed=config.seed,
        channels=config.backbone.in_chans,
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=config.trainer.accumulate,
        first_step=start.done,
        skipped=skipped,
        local_world=config.trainer.devices,
        device=trainer.strategy.root_device,
    )
    if trainer.is_global_zero:
        begin_run(config, start.pictures)
        verdicts = outlook(config.method, plan, method.peak_lr)
        for verdict in [] if start.done else verdicts:
            health.journal.write(0, **verdict._asdict())
        print(introduction(config, plan, method, start, verdicts, online), flush=True)
    with named_faults(keeper):
        trainer.fit(method, loader, ckpt_path=start.checkpoint, weights_only=True)
    disband()
    refuse_divergence(keeper, steps, trainer.global_step)

    if trainer.is_global_zero:
        views = config.method.views
        source = f"{folder} after {trainer.global_step} steps"
        # From the checkpoint: with fsdp no process has the whole network.
        target = load_backbone(str(folder)).backbone
        export_backbone(target, folder / "backbone.safetensors", mean=views.mean, std=views.std, source=source)
        said = [*online.summary(), *panels.summary()]
        print(conclusion(folder, trainer.global_step, plan, health.verdict, steps, skipped, said))
        if outcome := signals.pass_on():
            print(outcome)
    return folder


def make_loggers(config: AnyRun, done: int) -> list[Logger]:
    """metrics.csv always; wandb beside it, with the run's id kept in the run folder."""
    folder = config.run.path
    metrics = MetricsCSV(folder / "metrics.csv", done)
    loggers: list[Logger] = [metrics]
    if config.logger.name == "wandb":
        id_file = folder / "wandb_id.txt"
        if first_process() and not (id_file.exists() and id_file.read_text(encoding="utf-8")):
            with durable(id_file) as file:
                file.write(uuid.uuid4().hex[:8].encode())
        wandb = Wandb(
            behind=metrics.latest,
            project=config.logger.project,
            name=config.run.name,
            id=id_file.read_text(encoding="utf-8") if first_process() else None,
            resume="allow",
            save_dir=folder,
            mode="offline" if config.logger.offline else None,
        )
        wandb.log_hyperparams(config.model_dump(mode="json"))
        loggers.append(wandb)
    return loggers
