"""`ssl-vit finetune`: train a whole network with labels, as a run, and test it once at the end.

ssl-vit finetune checkpoint=runs/photos data.root=labelled run.name=photos-ft
ssl-vit finetune checkpoint=random:runs/photos data.root=labelled run.name=from-scratch
ssl-vit finetune checkpoint=runs/photos data.root=labelled data.image_size=384 run.name=photos-ft-384
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from ssl_vit.commands.pretrain import make_loggers
from ssl_vit.commands.publish import shown
from ssl_vit.config import PretrainDataConfig
from ssl_vit.config_evaluation import FinetuneConfig
from ssl_vit.data.loading import training_loader
from ssl_vit.data.pictures import Pictures, SkippedPictures, Subset
from ssl_vit.distributed import disband
from ssl_vit.durable import durable, write_json
from ssl_vit.errors import UserError
from ssl_vit.evaluation.knn import rank_of
from ssl_vit.evaluation.probes import TEST_SHARE, split_rule, stratified
from ssl_vit.evaluation.study import NETWORK, Study
from ssl_vit.methods.base import Plan, make_plan
from ssl_vit.methods.finetune import FineTuning, trainable
from ssl_vit.models.weights import export_backbone
from ssl_vit.processes import first_process
from ssl_vit.records.naming import data_name
from ssl_vit.records.record import Answers, Score, accuracies
from ssl_vit.training.agreement import SameStart
from ssl_vit.training.faults import named_faults, refuse_divergence
from ssl_vit.training.hardware import best_device
from ssl_vit.training.held_out import HeldOut, answer
from ssl_vit.training.journal import Journal
from ssl_vit.training.keeper import Keeper
from ssl_vit.training.origin import compare_origin, keep_origin, origin
from ssl_vit.training.progress import RunProgress
from ssl_vit.training.report import conclusion, schedules_along, way_on
from ssl_vit.training.runs import Start, begin_run, locked, open_run, with_extension
from ssl_vit.training.signals import StopSignals
from ssl_vit.training.skipping import SkippedSteps
from ssl_vit.training.trainer import make_trainer, quiet_lightning, tune
from ssl_vit.transforms.augment import RandAugment, crop_views
from ssl_vit.transforms.crops import MultiCrop


class Parts(NamedTuple):
    """The labelled pictures, by what they are for."""

    learned: Subset
    held_out: Subset
    test: Pictures
    split: str


def main(config: FinetuneConfig) -> None:
    """Run the command."""
    finetune(config)


def finetune(config: FinetuneConfig) -> Path:
    """Train, test, export, and return the run folder.

    Raises:
        UserError: Of the configuration, the network, the pictures or the run folder, before any training; or training
            failed.
    """
    quiet_lightning()
    config = with_extension(config)
    out = config.out or config.run.path / "eval" / f"finetune-{data_name(config.data)}.json"
    study = Study.begin("finetune", config.model_copy(update={"out": out}))
    parts = divide(config, study.pictures.train, study.pictures.test)
    plan = make_plan(config, len(parts.learned))
    method = build(config, study, plan)
    with locked(config.run):
        start = open_run(config, study.pictures.train)
        if start.pictures is not study.pictures.train:  # run.keep_pictures
            study = replace(study, pictures=study.pictures._replace(train=start.pictures))
            parts = divide(config, start.pictures, study.pictures.test)
            plan = make_plan(config, len(parts.learned))
            method = build(config, study, plan)
        now = origin(study.loaded, parts.learned, parts.held_out, parts.test)
        if start.checkpoint:
            start = start._replace(notes=[*start.notes, *compare_origin(config.run.path, now)])
        elif first_process():
            keep_origin(config.run.path, now)
        return train(config, study, parts, plan, method, start)


def divide(config: FinetuneConfig, pictures: Pictures, test: Pictures | None) -> Parts:
    """What to learn from, what to watch the training on, and what to test on at the end.

    Raises:
        UserError: No class has pictures enough for it.
    """
    places, split = torch.arange(len(pictures)), split_rule(test, config.seed)
    if test is None:
        tested = stratified(pictures.labels, TEST_SHARE, seed=config.seed)
        test, places = Subset(pictures, places[tested]), places[~tested]
    held = stratified(pictures.labels[places], config.held_out, seed=config.seed)
    if not len(test) or not held.any():
        raise UserError("no class has pictures enough: none can be held out")
    return Parts(Subset(pictures, places[~held]), Subset(pictures, places[held]), test, split)


def build(config: FinetuneConfig, study: Study, plan: Plan) -> FineTuning:
    """The Lightning module, its backbone in the form that the device is good at."""
    torch.manual_seed(config.seed)
    size = study.transform.image_size
    backbone = trainable(study.loaded, image_size=size, drop_path=config.method.drop_path)
    views = crop_views(config.method, size, study.loaded.mean, study.loaded.std)
    try:
        method = FineTuning(config.method, views, backbone, len(study.pictures.train.classes), plan)
    except ValueError as error:  # of the schedules: a warm-up longer than the run
        raise UserError(f"method.optimizer: {error}") from None
    tune(method, config.trainer)
    return method


def train(config: FinetuneConfig, study: Study, parts: Parts, plan: Plan, method: FineTuning, start: Start) -> Path:
    """From the start to the end of the run, or to where it is stopped."""
    folder = config.run.path
    skipped = SkippedPictures(folder / "skipped.txt")
    signals = StopSignals()
    keeper = Keeper(folder / "checkpoints", signals, lambda: False, config.trainer)
    steps = SkippedSteps(
        Journal(folder / "skipped_steps.jsonl", start.done), parts.learned, budget=config.trainer.skip_budget
    )
    progress = RunProgress(plan.total_steps, plan.batch_size, every=plan.log_every)
    held_out = HeldOut(parts.held_out, study.transform, every_epochs=config.validate_every_epochs, skipped=skipped)
    callbacks = [signals, SameStart(config, start), steps, progress, held_out, keeper]
    trainer = make_trainer(config, plan, make_loggers(config, start.done), callbacks, keeper.files, folder)
    augment = RandAugment(config.method.rand_augment, size=study.transform.image_size, mean=study.loaded.mean)
    loader = training_loader(
        parts.learned,
        MultiCrop(method.views),
        PretrainDataConfig(
            source=config.data.source,
            root=config.data.root or config.data.train or Path(),
            batch_size=config.data.batch_size,
            workers=config.data.workers,
            memory_gb=config.memory_gb,
        ),
        seed=config.seed,
        channels=method.target.config.in_chans,
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=config.trainer.accumulate,
        first_step=start.done,
        skipped=skipped,
        local_world=config.trainer.devices,
        augment=augment if config.method.rand_augment.layers else None,
        device=trainer.strategy.root_device,
    )
    if trainer.is_global_zero:
        begin_run(config, start.pictures)
        print(introduction(config, study, parts, plan, method, start), flush=True)
    with named_faults(keeper):
        trainer.fit(method, loader, ckpt_path=start.checkpoint, weights_only=True)
    disband()
    refuse_divergence(keeper, steps, trainer.global_step)

    if trainer.is_global_zero:
        export(folder, method, study.pictures.train.classes, step=trainer.global_step)
        print(conclusion(folder, trainer.global_step, plan, None, steps, skipped, online=[]))
        if trainer.global_step == plan.total_steps:
            test(config, study, parts, method)
        if outcome := signals.pass_on():
            print(outcome)
    return folder


def introduction(
    config: FinetuneConfig, study: Study, parts: Parts, plan: Plan, method: FineTuning, start: Start
) -> str:
    """What is about to happen."""
    size = sum(parameter.numel() for parameter in method.target.parameters()) / 1e6
    optimizer = config.method.optimizer
    lines = [
        f"{len(parts.learned):,} pictures of {len(start.pictures.classes)} classes, {plan.batch_size} per step, "
        f"{plan.steps_per_epoch:,} steps per epoch, {plan.total_steps:,} steps in all",
        f"{len(parts.held_out):,} training pictures held out, {len(parts.test):,} test pictures for the end "
        f"({parts.split})",
        f"fine-tuning {study.loaded.source}, {size:.1f} M parameters, at {study.transform.image_size} pixels, run "
        f"folder {config.run.path}",
        f"learning rate {optimizer.lr:g} x {plan.batch_size}/{optimizer.lr_batch_size} = {method.peak_lr:.3g} at the "
        f"head, x {config.method.layer_decay:g} per layer below",
        *schedules_along(plan, method),
        *way_on(plan, method, start, make_plan(start.before, len(parts.learned))),
    ]
    return "\n".join(lines)


def export(folder: Path, method: FineTuning, classes: list[str], *, step: int) -> None:
    """Write `backbone.safetensors`, as pretraining does, and `head.safetensors` with the linear layer on its [CLS]."""
    views = method.views
    source = f"{folder} after {step} steps"
    export_backbone(method.target, folder / "backbone.safetensors", mean=views.mean, std=views.std, source=source)
    head = method.student.head[0]
    with durable(folder / "head.safetensors") as file:
        file.write(save({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}))
    about = {"logits": "weight @ [CLS] token after the final norm + bias", "classes": classes, "source": source}
    write_json(folder / "head.json", about)


def test(config: FinetuneConfig, study: Study, parts: Parts, method: FineTuning) -> None:
    """Look at the test pictures, once, with the last weights, and write the record.

    Raises:
        UserError: No test picture can be read.
    """
    folder = config.run.path
    skipped = [SkippedPictures(folder / name) for name in ("skipped.txt", "skipped_test.txt")]
    skipped[1].path.unlink(missing_ok=True)
    method.to(best_device(config.trainer.accelerator))
    logits, labels, index = answer(method.student, parts.test, study.transform, skipped=skipped[1], show=True)
    ranks = rank_of(labels, logits)
    place = parts.test.places[index] if isinstance(parts.test, Subset) else index
    answers = Answers(place, labels, logits.argmax(dim=1), ranks)
    metrics = accuracies(ranks, len(study.pictures.train.classes))
    plan = method.plan
    record = study.finish(
        [Score(NETWORK, metrics, {"run": str(folder), "steps": plan.total_steps}, {"": answers})],
        protocol={
            "trained": "the whole network and a linear head on [CLS], by cross-entropy",
            "method": config.method.model_dump(mode="json"),
            "steps": plan.total_steps,
            "batch_size": plan.batch_size,
            "held_out": config.held_out,
            "selection": "none: the last weights, tested once",
            "split": parts.split,
        },
        train_labels=parts.learned.labels,
        test_labels=labels,
        findings={"skipped": sum(part.count() for part in skipped)},
        warnings=[f"{n:,} pictures could not be read: {part.path}" for part in skipped if (n := part.count())],
        by_class="",
        sheet=config.sheet,
    )
    print(shown(record, study.out))
