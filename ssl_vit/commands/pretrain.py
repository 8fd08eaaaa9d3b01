"""`ssl-vit pretrain`: train a backbone on a folder of images, and export its weights for timm."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ssl_vit.commands.run_figures import training_figures
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.loading.loader import build_train_loader
from ssl_vit.data.sources.image_folder import ImageFolder, split_folders
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.data.value_notes import value_notes
from ssl_vit.methods.base import SSLMethod
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.atomic_io import JSONLWriter
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.callbacks.health_monitor import HealthMonitor
from ssl_vit.training.callbacks.image_logger import ImageLogger
from ssl_vit.training.callbacks.online_eval import OnlineEval
from ssl_vit.training.callbacks.unlabeled_eval import UnlabeledEval
from ssl_vit.training.config_check import check_config, check_start
from ssl_vit.training.console import start_summary
from ssl_vit.training.loop import fit_run
from ssl_vit.training.run_dir import RunState, apply_extension, lock_run_dir, open_run_dir
from ssl_vit.training.start import Start
from ssl_vit.training.trainer import build_method, describe_computation, silence_lightning


def main(config: PretrainConfig) -> None:
    """Run the command."""
    pretrain(config)


def pretrain(config: PretrainConfig, dataset: ImageDataset | None = None) -> Path:
    """Train on the images of `data.root`, or on `dataset`; export the backbone, and return the run directory.

    Raises:
        UserError: The config, the images or the run directory are not usable, or training failed.
    """
    silence_lightning()
    config = apply_extension(config)
    dataset = (dataset or build_dataset(config.data.source, config.data.root)).with_range(config.data.range)
    with lock_run_dir(config.run):
        run = open_run_dir(config, dataset)
        start = Start(config, run)
        train(config, run, build_method(config, run.plan, start.prepare), start)
    return config.run.path


def train(config: PretrainConfig, run: RunState, method: SSLMethod, start: Start) -> None:
    """Train from the state of the run to its end, or until it is stopped."""
    views, plan = config.method.views, run.plan
    method.value_range = config.data.range
    skipped = SkippedImageLog(run.path / "skipped_images.txt")
    warnings = check_config(config.method, plan, method.peak_lr)
    warnings += check_start(config, plan, method.rates, method.peak_lr, start.facts)
    journal = JSONLWriter(run.path / "health.jsonl", run.done)
    health = HealthMonitor(
        method.health_checks(),
        journal,
        config_warnings=warnings,
        first_step=method.warmup_steps,
        every=plan.log_every,
    )
    online, unlabeled = _evaluations(config, run, skipped, journal)
    render = training_figures(config, method)
    images = ImageLogger(config.image_logging, run, views, config.backbone, render=render, skipped=skipped)

    loader = partial(
        build_train_loader,
        run.dataset,
        MultiCrop(views),
        config.data,
        seed=config.seed,
        channels=config.backbone.in_chans,
    )
    summary = start_summary(
        run,
        method,
        images=[pluralize(len(run.train), "image"), *_describe_images(run.dataset)],
        model=_describe_model(config, method, start),
        notes=[
            *start.describe(method),
            describe_computation(config.trainer),
            *value_notes(run.dataset),
            *online.plan(),
            *unlabeled.plan(),
            *(f"Health: {warning}" for warning in warnings),
        ],
    )
    result = fit_run(
        config,
        run,
        method,
        loader,
        [health, online, unlabeled, images],
        skipped=skipped,
        summary=summary,
        is_best=lambda: online.improved,
    )
    if result.is_global_zero:
        export_run(config, step=result.step)
        print(result.summary([*health.summary(), *online.summary(), *unlabeled.summary(), *images.summary()]))
        result.requeue_job()


def _evaluations(
    config: PretrainConfig, run: RunState, skipped: SkippedImageLog, journal: JSONLWriter
) -> tuple[OnlineEval, UnlabeledEval]:
    """Return the evaluation with labels, and for a run from weights the one without where there are none."""
    from_weights, views = config.checkpoint is not None, config.method.views
    online = OnlineEval(
        config.online, run, views, seed=config.seed, skipped=skipped, journal=journal, from_weights=from_weights
    )
    every = config.online.every_epochs if from_weights and not online.main.data else None
    return online, UnlabeledEval(run, views, every_epochs=every, skipped=skipped)


def export_run(config: PretrainConfig, *, step: int) -> None:
    """Write `backbone.safetensors` from the last checkpoint: with FSDP no process has the whole model."""
    path, views = config.run.path, config.method.views
    export_backbone(
        load_backbone(str(path)).backbone,
        path / "backbone.safetensors",
        mean=views.mean,
        std=views.std,
        source=f"{path} after {step} steps",
        value_range=config.data.range,
    )


def _describe_images(dataset: ImageDataset) -> list[str]:
    """Return which images are trained on, and a word where they include those of a test set."""
    lines = [dataset.describe()]
    if isinstance(dataset, ImageFolder) and (splits := split_folders(dataset.names)):
        lines.append(f"{', '.join(splits)} are splits: the images of all of them are trained on")
    return lines


def _describe_model(config: PretrainConfig, method: SSLMethod, start: Start) -> str:
    """Return what is trained, from which weights, and where it differs from what the model's name says."""
    model = f"{config.method.name} on {config.backbone.name} with {method.eval_backbone.describe()}"
    text = f"{model}, from {start.source}"
    changed = config.backbone.overridden() if config.checkpoint is None else []
    return text + (f" (not as the name says: {', '.join(changed)})" if changed else "")
