"""`ssl-vit finetune`: train a whole model with labels, as a run, and evaluate it once on the test images.

ssl-vit finetune checkpoint=runs/photos data.root=labeled run.name=photos-ft
ssl-vit finetune checkpoint=random:runs/photos data.root=labeled run.name=from-scratch
ssl-vit finetune checkpoint=runs/photos data.root=labeled data.image_size=384 run.name=photos-ft-384
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save

from ssl_vit.commands.log_results import draw_confusion, format_result
from ssl_vit.config.evaluate import FinetuneConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset
from ssl_vit.data.transforms.mixup import single_view_config
from ssl_vit.data.value_notes import value_notes
from ssl_vit.evaluation.classification.knn import rank_of_true_class
from ssl_vit.evaluation.classification.linear_classifier import TEST_SHARE, split_rule, stratified
from ssl_vit.evaluation.evaluator import MODEL, Evaluation
from ssl_vit.evaluation.results.eval_result import ModelScores, Predictions, topk_metrics
from ssl_vit.evaluation.results.provenance import data_name
from ssl_vit.methods.finetune import FineTune, prepare_for_finetuning
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.callbacks.validation import ValidationCallback, predict
from ssl_vit.training.console import start_summary
from ssl_vit.training.data_module import labeled_train_loader
from ssl_vit.training.loop import fit_run
from ssl_vit.training.resume_checks import SOURCE, Splits, check_source_unchanged, finetune_source
from ssl_vit.training.run_dir import RunState, apply_extension, lock_run_dir, open_run_dir
from ssl_vit.training.trainer import configure_backbones, describe_computation, silence_lightning


def main(config: FinetuneConfig) -> None:
    """Run the command."""
    finetune(config)


def finetune(config: FinetuneConfig) -> Path:
    """Train, evaluate on the test images, export, and return the run directory.

    Raises:
        UserError: The config, the model, the images or the run directory are not usable, or training failed.
    """
    silence_lightning()
    config = apply_extension(config)
    out = config.out or config.run.path / "eval" / f"finetune-{data_name(config.data)}.json"
    evaluation = Evaluation.start("finetune", config.model_copy(update={"out": out}))
    train, test = evaluation.dataset
    with lock_run_dir(config.run):
        run = open_run_dir(config, train, lambda dataset: split_dataset(config, dataset, test).train)
        evaluation = replace(evaluation, dataset=evaluation.dataset._replace(train=run.dataset))
        splits = split_dataset(config, run.dataset, test)
        method = build_method(config, evaluation, run.plan)
        source = finetune_source(evaluation.loaded, splits)
        if run.checkpoint:
            run = run._replace(notes=(*run.notes, *check_source_unchanged(run.path, source)))
        elif is_rank_zero():
            write_json(run.path / SOURCE, source)
        train_and_test(config, evaluation, splits, run, method)
    return config.run.path


def split_dataset(config: FinetuneConfig, dataset: ImageDataset, test: ImageDataset | None) -> Splits:
    """Split the labeled images by class; without a test set of its own, a part of them becomes that.

    Raises:
        UserError: No class has enough images.
    """
    indices, rule = torch.arange(len(dataset)), split_rule(test, config.seed)
    if test is None:
        is_test = stratified(dataset.labels, TEST_SHARE, seed=config.seed)
        test, indices = Subset(dataset, indices[is_test]), indices[~is_test]
    is_val = stratified(dataset.labels[indices], config.val_fraction, seed=config.seed)
    if not len(test) or not is_val.any():
        raise UserError("no class has enough images for a train, val and test split")
    return Splits(Subset(dataset, indices[~is_val]), Subset(dataset, indices[is_val]), test, rule)


def build_method(config: FinetuneConfig, evaluation: Evaluation, plan: TrainingPlan) -> FineTune:
    """Build the Lightning module, its backbone configured for the device.

    Raises:
        UserError: The schedules do not fit the length of the run.
    """
    torch.manual_seed(config.seed)
    size, loaded = evaluation.transform.image_size, evaluation.loaded
    backbone = prepare_for_finetuning(loaded, image_size=size, drop_path=config.method.drop_path)
    views = single_view_config(config.method, size, loaded.mean, loaded.std)
    try:
        method = FineTune(config.method, views, backbone, len(evaluation.dataset.train.classes), plan)
    except ValueError as error:  # a warm-up longer than the run
        raise UserError(f"method.optimizer: {error}") from None
    method.value_range = evaluation.dataset.train.value_range
    configure_backbones(method, config.trainer)
    return method


def train_and_test(
    config: FinetuneConfig, evaluation: Evaluation, splits: Splits, run: RunState, method: FineTune
) -> None:
    """Train from the state of the run to its end, or until it is stopped; at the end evaluate on the test images."""
    transform = evaluation.transform
    skipped = SkippedImageLog(run.path / "skipped_images.txt")
    validation = ValidationCallback(splits.val, transform, every_epochs=config.validate_every_epochs, skipped=skipped)
    loader = labeled_train_loader(
        splits.train,
        method.views,
        config.data,
        config.method.rand_augment,
        seed=config.seed,
        channels=method.eval_backbone.config.in_chans,
        cache_gb=config.cache_gb,
    )
    images = [
        f"{pluralize(len(splits.train), 'image')} of {len(run.dataset.classes)} classes",
        f"{len(splits.val):,} val images, {len(splits.test):,} test images ({splits.rule})",
    ]
    model = f"fine-tuning {evaluation.loaded.source}, at {transform.image_size} pixels"
    notes = [describe_computation(config.trainer), *value_notes(run.dataset)]
    summary = start_summary(run, method, images=images, model=model, notes=notes)
    result = fit_run(config, run, method, loader, [validation], skipped=skipped, summary=summary)
    if result.is_global_zero:
        export(run.path, method, evaluation.dataset.train.classes, step=result.step)
        print(result.summary())
        if result.complete:
            evaluate_test_set(config, evaluation, splits, method, resumed_at=run.done)
        result.requeue_job()


def export(folder: Path, method: FineTune, classes: list[str], *, step: int) -> None:
    """Write `backbone.safetensors`, as pretraining does, and `head.safetensors` with the linear layer on its [CLS]."""
    views = method.views
    source = f"{folder} after {step} steps"
    export_backbone(
        method.eval_backbone,
        folder / "backbone.safetensors",
        mean=views.mean,
        std=views.std,
        source=source,
        value_range=method.value_range,
    )
    head = method.student.head[0]
    with atomic_write(folder / "head.safetensors") as file:
        file.write(save({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}))
    logits = "weight @ [CLS] token after the final norm + bias"
    write_json(folder / "head.json", {"logits": logits, "classes": classes, "source": source})


def evaluate_test_set(
    config: FinetuneConfig, evaluation: Evaluation, splits: Splits, method: FineTune, *, resumed_at: int
) -> None:
    """Evaluate the last weights on the test images, once, and write the result.

    Raises:
        UserError: No test image can be read.
    """
    folder = config.run.path
    skipped = [SkippedImageLog(folder / name) for name in ("skipped_images.txt", "skipped_test_images.txt")]
    skipped[1].path.unlink(missing_ok=True)
    method.to(best_device(config.trainer.accelerator))
    logits, labels, index = predict(method.student, splits.test, evaluation.transform, skipped=skipped[1], show=True)
    ranks = rank_of_true_class(labels, logits)
    original_index = splits.test.indices[index] if isinstance(splits.test, Subset) else index
    predictions = Predictions(original_index, labels, logits.argmax(dim=1), ranks)
    metrics = topk_metrics(ranks, len(evaluation.dataset.train.classes))
    steps = method.plan.total_steps
    details = {"run": str(folder), "steps": steps}
    result = evaluation.write_result(
        [ModelScores(name=MODEL, metrics=metrics, details=details, predictions={"": predictions})],
        title="Fine-tuning",
        protocol={
            "trained": "the whole model and a linear head on [CLS], by cross-entropy",
            "method": config.method.model_dump(mode="json"),
            "steps": steps,
            "batch_size": config.data.batch_size,
            "val_fraction": config.val_fraction,
            "selection": "none: the last weights, tested once",
            "split": splits.rule,
        },
        train_labels=splits.train.labels,
        test_labels=labels,
        data_info={"skipped": sum(part.count() for part in skipped)},
        warnings=[
            *(f"{pluralize(n, 'image')} could not be read: {part.path}" for part in skipped if (n := part.count())),
            *([f"the cost is that of the last session, after step {resumed_at:,}"] if resumed_at else []),
        ],
        confusion_of="",
        figure=config.figure,
    )
    draw_confusion(result, evaluation)
    print(format_result(result, evaluation.out))
