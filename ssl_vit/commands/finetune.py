"""`ssl-vit finetune`: train a whole model with labels, as a run, and test it once at the end.

ssl-vit finetune checkpoint=runs/photos data.root=labeled run.name=photos-ft
ssl-vit finetune checkpoint=random:runs/photos data.root=labeled run.name=from-scratch
ssl-vit finetune checkpoint=runs/photos data.root=labeled data.image_size=384 run.name=photos-ft-384
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from ssl_vit.commands.log_results import draw_confusion, format_result
from ssl_vit.commands.pretrain import make_loggers
from ssl_vit.config.evaluate import FinetuneConfig
from ssl_vit.config.pretrain import PretrainDataConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset
from ssl_vit.data.loading.loader import build_train_loader
from ssl_vit.data.transforms.mixup import RandAugment, single_view_config
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.evaluation.classification.knn import rank_of_true_class
from ssl_vit.evaluation.classification.linear_classifier import TEST_SHARE, split_rule, stratified
from ssl_vit.evaluation.evaluator import MODEL, Evaluation
from ssl_vit.evaluation.results.eval_result import ModelScores, Predictions, topk_metrics
from ssl_vit.evaluation.results.provenance import data_name
from ssl_vit.methods.finetune import FineTune, prepare_for_finetuning
from ssl_vit.methods.schedules import TrainingPlan, make_plan
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.distributed import shutdown_process_group
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.jsonl import JSONLWriter
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.training.callbacks.consistency_check import ConsistencyCheck
from ssl_vit.training.callbacks.preemption import PreemptionHandler
from ssl_vit.training.callbacks.progress_bar import TrainingProgressBar
from ssl_vit.training.callbacks.run_checkpoint import RunCheckpoint
from ssl_vit.training.callbacks.skipped_steps import SkippedSteps
from ssl_vit.training.callbacks.validation import ValidationCallback, predict
from ssl_vit.training.console import final_summary, preview_schedules, resume_summary
from ssl_vit.training.failures import raise_if_diverged, translate_training_errors
from ssl_vit.training.finetune_source import compare_origin, finetune_source, keep_origin
from ssl_vit.training.run_dir import RunState, apply_extension, lock_run_dir, open_run_dir, write_run_metadata
from ssl_vit.training.trainer import build_trainer, configure_backbones, silence_lightning


class Splits(NamedTuple):
    """The labeled images, by what they are for."""

    learned: Subset
    held_out: Subset
    test: ImageDataset
    split: str


def main(config: FinetuneConfig) -> None:
    """Run the command."""
    finetune(config)


def finetune(config: FinetuneConfig) -> Path:
    """Train, test, export, and return the run folder.

    Raises:
        UserError: Of the configuration, the model, the images or the run folder, before any training; or training
            failed.
    """
    silence_lightning()
    config = apply_extension(config)
    out = config.out or config.run.path / "eval" / f"finetune-{data_name(config.data)}.json"
    study = Evaluation.start("finetune", config.model_copy(update={"out": out}))
    parts = split_dataset(config, study.dataset.train, study.dataset.test)
    plan = make_plan(config, len(parts.learned))
    method = build_method(config, study, plan)
    with lock_run_dir(config.run):
        start = open_run_dir(config, study.dataset.train)
        if start.dataset is not study.dataset.train:  # run.keep_image_list
            study = replace(study, dataset=study.dataset._replace(train=start.dataset))
            parts = split_dataset(config, start.dataset, study.dataset.test)
            plan = make_plan(config, len(parts.learned))
            method = build_method(config, study, plan)
        now = finetune_source(study.loaded, parts.learned, parts.held_out, parts.test)
        if start.checkpoint:
            start = start._replace(notes=[*start.notes, *compare_origin(config.run.path, now)])
        elif is_rank_zero():
            keep_origin(config.run.path, now)
        return train(config, study, parts, plan, method, start)


def split_dataset(config: FinetuneConfig, dataset: ImageDataset, test: ImageDataset | None) -> Splits:
    """What to learn from, what to watch the training on, and what to test on at the end.

    Raises:
        UserError: No class has images enough for it.
    """
    places, split = torch.arange(len(dataset)), split_rule(test, config.seed)
    if test is None:
        tested = stratified(dataset.labels, TEST_SHARE, seed=config.seed)
        test, places = Subset(dataset, places[tested]), places[~tested]
    held = stratified(dataset.labels[places], config.val_fraction, seed=config.seed)
    if not len(test) or not held.any():
        raise UserError("no class has images enough: none can be held out")
    return Splits(Subset(dataset, places[~held]), Subset(dataset, places[held]), test, split)


def build_method(config: FinetuneConfig, study: Evaluation, plan: TrainingPlan) -> FineTune:
    """The Lightning module, its backbone in the form that the device is good at."""
    torch.manual_seed(config.seed)
    size = study.transform.image_size
    backbone = prepare_for_finetuning(study.loaded, image_size=size, drop_path=config.method.drop_path)
    views = single_view_config(config.method, size, study.loaded.mean, study.loaded.std)
    try:
        method = FineTune(config.method, views, backbone, len(study.dataset.train.classes), plan)
    except ValueError as error:  # of the schedules: a warm-up longer than the run
        raise UserError(f"method.optimizer: {error}") from None
    configure_backbones(method, config.trainer)
    return method


def train(
    config: FinetuneConfig, study: Evaluation, parts: Splits, plan: TrainingPlan, method: FineTune, start: RunState
) -> Path:
    """From the start to the end of the run, or to where it is stopped."""
    folder = config.run.path
    skipped = SkippedImageLog(folder / "skipped_images.txt")
    signals = PreemptionHandler()
    keeper = RunCheckpoint(folder / "checkpoints", signals, lambda: False, config.trainer)
    steps = SkippedSteps(
        JSONLWriter(folder / "skipped_steps.jsonl", start.done), parts.learned, budget=config.trainer.max_skipped_steps
    )
    progress = TrainingProgressBar(plan.total_steps, plan.batch_size, every=plan.log_every)
    held_out = ValidationCallback(
        parts.held_out, study.transform, every_epochs=config.validate_every_epochs, skipped=skipped
    )
    callbacks = [signals, ConsistencyCheck(config, start), steps, progress, held_out, keeper]
    trainer = build_trainer(config, plan, make_loggers(config, start.done), callbacks, keeper.files, folder)
    augment = RandAugment(config.method.rand_augment, size=study.transform.image_size, mean=study.loaded.mean)
    loader = build_train_loader(
        parts.learned,
        MultiCrop(method.views),
        PretrainDataConfig(
            source=config.data.source,
            root=config.data.root or config.data.train or Path(),
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
            cache_gb=config.cache_gb,
        ),
        seed=config.seed,
        channels=method.eval_backbone.config.in_chans,
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=config.trainer.accumulate_grad_batches,
        first_step=start.done,
        skipped=skipped,
        local_world=config.trainer.devices,
        augment=augment if config.method.rand_augment.layers else None,
        device=trainer.strategy.root_device,
    )
    if trainer.is_global_zero:
        write_run_metadata(config, start.dataset)
        print(startup_summary(config, study, parts, plan, method, start), flush=True)
    with translate_training_errors(keeper):
        trainer.fit(method, loader, ckpt_path=start.checkpoint, weights_only=True)
    shutdown_process_group()
    raise_if_diverged(keeper, steps, trainer.global_step)

    if trainer.is_global_zero:
        export(folder, method, study.dataset.train.classes, step=trainer.global_step)
        print(final_summary(folder, trainer.global_step, plan, None, steps, skipped, online=[]))
        if trainer.global_step == plan.total_steps:
            test(config, study, parts, method)
        if outcome := signals.pass_on():
            print(outcome)
    return folder


def startup_summary(
    config: FinetuneConfig, study: Evaluation, parts: Splits, plan: TrainingPlan, method: FineTune, start: RunState
) -> str:
    """What is about to happen."""
    size = sum(parameter.numel() for parameter in method.eval_backbone.parameters()) / 1e6
    optimizer = config.method.optimizer
    lines = [
        f"{len(parts.learned):,} images of {len(start.dataset.classes)} classes, {plan.batch_size} per step, "
        f"{plan.steps_per_epoch:,} steps per epoch, {plan.total_steps:,} steps in all",
        f"{len(parts.held_out):,} training images held out, {len(parts.test):,} test images for the end "
        f"({parts.split})",
        f"fine-tuning {study.loaded.source}, {size:.1f} M parameters, at {study.transform.image_size} pixels, run "
        f"folder {config.run.path}",
        f"learning rate {optimizer.lr:g} x {plan.batch_size}/{optimizer.lr_batch_size} = {method.peak_lr:.3g} at the "
        f"head, x {config.method.layer_decay:g} per layer below",
        *preview_schedules(plan, method),
        *resume_summary(plan, method, start, make_plan(start.before, len(parts.learned))),
    ]
    return "\n".join(lines)


def export(folder: Path, method: FineTune, classes: list[str], *, step: int) -> None:
    """Write `backbone.safetensors`, as pretraining does, and `head.safetensors` with the linear layer on its [CLS]."""
    views = method.views
    source = f"{folder} after {step} steps"
    export_backbone(
        method.eval_backbone, folder / "backbone.safetensors", mean=views.mean, std=views.std, source=source
    )
    head = method.student.head[0]
    with atomic_write(folder / "head.safetensors") as file:
        file.write(save({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}))
    about = {"logits": "weight @ [CLS] token after the final norm + bias", "classes": classes, "source": source}
    write_json(folder / "head.json", about)


def test(config: FinetuneConfig, study: Evaluation, parts: Splits, method: FineTune) -> None:
    """Look at the test images, once, with the last weights, and write the record.

    Raises:
        UserError: No test image can be read.
    """
    folder = config.run.path
    skipped = [SkippedImageLog(folder / name) for name in ("skipped_images.txt", "skipped_test_images.txt")]
    skipped[1].path.unlink(missing_ok=True)
    method.to(best_device(config.trainer.accelerator))
    logits, labels, index = predict(method.student, parts.test, study.transform, skipped=skipped[1], show=True)
    ranks = rank_of_true_class(labels, logits)
    place = parts.test.indices[index] if isinstance(parts.test, Subset) else index
    answers = Predictions(place, labels, logits.argmax(dim=1), ranks)
    metrics = topk_metrics(ranks, len(study.dataset.train.classes))
    plan = method.plan
    details = {"run": str(folder), "steps": plan.total_steps}
    record = study.write_result(
        [ModelScores(name=MODEL, metrics=metrics, details=details, predictions={"": answers})],
        title="Fine-tuning",
        protocol={
            "trained": "the whole model and a linear head on [CLS], by cross-entropy",
            "method": config.method.model_dump(mode="json"),
            "steps": plan.total_steps,
            "batch_size": plan.batch_size,
            "held_out": config.val_fraction,
            "selection": "none: the last weights, tested once",
            "split": parts.split,
        },
        train_labels=parts.learned.labels,
        test_labels=labels,
        data_info={"skipped": sum(part.count() for part in skipped)},
        warnings=[f"{n:,} images could not be read: {part.path}" for part in skipped if (n := part.count())],
        confusion_of="",
        figure=config.figure,
    )
    draw_confusion(record, study)
    print(format_result(record, study.out))
