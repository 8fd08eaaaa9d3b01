"""The published linear evaluations of DINO and SiT, as runs: frozen features of images augmented in each epoch."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from ssl_vit.config.evaluate import LinearConfig
from ssl_vit.config.pretrain import PretrainDataConfig, RunDirConfig
from ssl_vit.data.batch import Batch
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.loading.loader import build_eval_loader, build_train_loader
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.mixup import MixupCutmix, RandAugment, single_view_config
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.evaluation.evaluator import MODEL, Evaluation
from ssl_vit.evaluation.features.extractor import on_best_device
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores, Predictions, sibling_path, topk_metrics
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.models.checkpoint import set_epoch_counts, torch_load_weights_only
from ssl_vit.runtime.atomic_io import JSONLWriter, write_json
from ssl_vit.runtime.device import autocast_dtype
from ssl_vit.runtime.errors import RankFinished, UserError
from ssl_vit.runtime.launch import torchrun_rank
from ssl_vit.runtime.rng import seeded_global_rng
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.callbacks.probe_evaluation import ProbeEvaluation
from ssl_vit.training.checkpointing import resume_point
from ssl_vit.training.loop import fit
from ssl_vit.training.published_protocols import PROBES, TRAINER, Probe
from ssl_vit.training.run_dir import RunState, lock_run_dir
from ssl_vit.training.trainer import silence_lightning

PROTOCOL = "protocol.json"  # of a probe's directory: what a resumed probe must share with it
_LAST = ", last epoch"  # suffix of the metrics that nothing was selected for
_CACHE_GB = 2.0  # smaller datasets stay in memory


def published_probe(config: LinearConfig) -> tuple[EvalResult, Evaluation]:
    """Train the heads of `config.protocol`, or resume them, and write the result.

    The same command resumes from the checkpoints in a directory per seed beside the result.

    Raises:
        UserError: Model and images do not fit the protocol, or the directory contains another probe.
        RankFinished: Another process of this launch trains the probe.
        KeyboardInterrupt: Training was stopped, and its state is saved.
    """
    if torchrun_rank()[0]:
        raise RankFinished
    silence_lightning()
    evaluation = Evaluation.start(f"linear-{config.protocol}", config)
    if evaluation.dataset.test is None:
        raise UserError(
            f"protocol={config.protocol} is chosen on test images: data.root needs train/ and val/ or test/"
        )
    classes = len(evaluation.dataset.train.classes)
    with seeded_global_rng() as seed:
        seed(config.seed)
        probe = PROBES[config.protocol](
            evaluation.loaded.backbone, classes, epochs=config.epochs, batch_size=config.data.batch_size
        )
    on_best_device(evaluation.loaded)
    folder = sibling_path(evaluation.out, f"-seed{config.seed}")
    protocol = _protocol(config, probe)
    run = RunDirConfig(name=folder.name, folder=folder.parent, resume=True, overwrite=False)
    with lock_run_dir(run, alternative="out=OTHER.json"):
        folder.mkdir(exist_ok=True)
        test, skipped = _train(config, evaluation, probe, _identity(evaluation, protocol), folder)
    score = _score(probe, test, classes, folder)
    warnings = [
        "chosen on the test images, as published: the first accuracy of each head is the best over the epochs, "
        "too high by design; 'last epoch' is not chosen"
    ]
    if unread := sum(part.count() for part in skipped):
        warnings.append(f"{pluralize(unread, 'image')} could not be read: {folder / 'skipped*.txt'}")
    result = evaluation.write_result(
        [score],
        protocol=protocol,
        train_labels=evaluation.dataset.train.labels,
        test_labels=test.labels,
        data_info={"skipped": unread},
        warnings=warnings,
        selection={"on": "test images", "chosen": {"epoch": score.details["best_epoch"]}},
        confusion_of=next(suffix for suffix in score.predictions if suffix.endswith(_LAST)),
        figure=config.figure,
    )
    return result, evaluation


class LinearProbe(L.LightningModule):
    """Heads on the features of a frozen backbone, which is no part of the module or its checkpoints."""

    def __init__(self, probe: Probe, evaluation: Evaluation, *, steps_per_epoch: int) -> None:
        super().__init__()
        loaded = evaluation.loaded
        self.probe = probe
        self.heads = probe.heads
        self.steps_per_epoch = steps_per_epoch
        self._backbone = (loaded.backbone,)  # in a tuple, torch does not register it
        self.views = single_view_config(probe.augmentation, evaluation.transform.image_size, loaded.mean, loaded.std)
        self.color = ColorAugmentation(self.views)
        self.mix = MixupCutmix(probe.augmentation, len(evaluation.dataset.train.classes))

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the probe's features (B, D) float32 of normalized images, without gradient."""
        dtype = autocast_dtype(images.device)
        with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return [feature.float() for feature in self.probe.features(self._backbone[0], images)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = self.color(batch.global_views, batch.key).squeeze(1)  # (B, C, H, W)
        images, targets = self.mix(images, batch.label, batch.key)
        return self.probe.loss(self.features(images), targets)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(index=batch.index, key=batch.key)  # stay on the CPU, to avoid a device sync

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        for group in self.probe.optimizer.param_groups:
            group["lr"] = self.probe.lr(self.current_epoch)

    def configure_optimizers(self) -> Optimizer:
        return self.probe.optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        set_epoch_counts(checkpoint, self.global_step, self.steps_per_epoch)


def _train(
    config: LinearConfig, evaluation: Evaluation, probe: Probe, identity: dict[str, Any], folder: Path
) -> tuple[ProbeEvaluation, list[SkippedImageLog]]:
    """Train the probe to its end, from its latest checkpoint if there is one."""
    train, test = evaluation.dataset
    assert test is not None
    skipped = [SkippedImageLog(folder / name) for name in ("skipped_images.txt", "skipped_test_images.txt")]
    skipped[1].path.unlink(missing_ok=True)
    steps_per_epoch = max(1, len(train) // config.data.batch_size)
    module = LinearProbe(probe, evaluation, steps_per_epoch=steps_per_epoch)
    features, index = _test_features(module, evaluation, test, skipped[1])
    _check_identity(folder, identity, index)
    found, notes = resume_point(folder / "checkpoints", otherwise=f"delete {folder} to start from scratch")
    plan = TrainingPlan(
        total_steps=probe.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        batch_size=config.data.batch_size,
        log_every=1,
        seed=config.seed,
    )
    run = RunState(folder, train, train, plan, resume_with="the same command")
    if found:
        run = run._replace(checkpoint=found.path, done=found.step)
    else:
        skipped[0].path.unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    for note in notes:
        print(note)
    journal = JSONLWriter(folder / "epochs.jsonl", run.done // steps_per_epoch)
    test_results = ProbeEvaluation(probe, features, test.labels[index], index, journal)
    if found and found.step == plan.total_steps:
        print(f"{folder} is already complete")
        test_results.load_state_dict(torch_load_weights_only(found.path)["callbacks"][test_results.state_key])
        return test_results, skipped
    result = fit(module, run, _train_loader(config, evaluation, module), TRAINER, [test_results], skipped=skipped[0])
    if not result.complete:
        print(f"Stopped and saved after step {result.step:,} of {plan.total_steps:,}. Resume with the same command.")
        result.requeue_job()
        raise KeyboardInterrupt
    return test_results, skipped


def _train_loader(config: LinearConfig, evaluation: Evaluation, module: LinearProbe) -> partial[Any]:
    """Return the factory of cropped and flipped training batches, with RandAugment where the protocol has it."""
    rand_augment = module.probe.augmentation.rand_augment
    augment = RandAugment(rand_augment, size=evaluation.transform.image_size, mean=evaluation.loaded.mean)
    return partial(
        build_train_loader,
        evaluation.dataset.train,
        MultiCrop(module.views),
        PretrainDataConfig(
            source=config.data.source,
            root=config.data.root or config.data.train or Path(),
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
            cache_gb=_CACHE_GB,
        ),
        seed=config.seed,
        channels=evaluation.loaded.backbone.config.in_chans,
        augment=augment if rand_augment.layers else None,
    )


def _test_features(
    module: LinearProbe, evaluation: Evaluation, dataset: ImageDataset, skipped: SkippedImageLog
) -> tuple[list[Tensor], Tensor]:
    """Return the probe's features (N, D) of all readable test images, without augmentation, and their indices (N,)."""
    data, backbone = evaluation.config.data, evaluation.loaded.backbone
    loader = build_eval_loader(
        dataset,
        evaluation.transform,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        channels=backbone.config.in_chans,
        skipped=skipped,
    )
    rows, indices = [], []
    for batch, index in loader:
        rows.append(module.features(evaluation.transform.normalize(batch.to(backbone.device))))
        indices.append(index)
    return [torch.cat(parts) for parts in zip(*rows, strict=True)], torch.cat(indices)


def _check_identity(folder: Path, identity: dict[str, Any], index: Tensor) -> None:
    """Check that the directory contains this probe, or none; start from scratch if other test images are readable.

    Accuracies on different test images could not be compared.

    Raises:
        UserError: It contains another probe.
    """
    path, before = folder / PROTOCOL, None
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} is damaged. Delete {folder} to start from scratch") from None
        if changed := [name for name, value in identity.items() if before.get(name) != value]:
            raise UserError(
                f"{folder} contains a probe with another {' and another '.join(changed)}. Delete that directory, or "
                "use out=OTHER.json"
            )
    readable = hashlib.sha256(index.numpy().tobytes()).hexdigest()
    if before and before.get("readable test images") != readable:
        print(f"{folder}: other test images can be read than before. The probe starts from scratch")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    write_json(path, {**identity, "readable test images": readable})


def _score(probe: Probe, test: ProbeEvaluation, classes: int, folder: Path) -> ModelScores:
    metrics, predictions = [], {}
    for head in probe.heads:
        name = f", {head}" if len(probe.heads) > 1 else ""
        for suffix, (ranks, predicted) in ((name, test.best[head]), (f"{name}{_LAST}", test.last[head])):
            metrics += topk_metrics(ranks, classes, suffix)
            predictions[suffix] = Predictions(test.index, test.labels, predicted, ranks)
    best = {head: max(points, key=lambda point: point[1])[0] for head, points in test.accuracy.items()}
    details = {"best_epoch": best, "looks": test.accuracy, "seconds": round(test.seconds, 1), "run": str(folder)}
    return ModelScores(name=MODEL, metrics=metrics, details=details, predictions=predictions)


def _protocol(config: LinearConfig, probe: Probe) -> dict[str, Any]:
    evaluations = -(-probe.epochs // probe.every)
    return {
        "probe": config.protocol,
        **probe.about,
        "epochs": probe.epochs,
        "batch_size": config.data.batch_size,
        "selection": f"on the test images: the best of {evaluations} looks at them, as published",
        "split": "train and test",
    }


def _identity(evaluation: Evaluation, protocol: dict[str, Any]) -> dict[str, Any]:
    """Return what a probe must share with the one in its directory to resume it."""
    return {
        "protocol": repr(protocol),
        "model": f"{evaluation.loaded.source} {evaluation.loaded.sha256}",
        "dataset": [part.fingerprint(sizes=True) for part in evaluation.dataset if part is not None],
        "transform": repr(evaluation.transform.describe()),
        "seed": evaluation.config.seed,
        "precision of the model": str(autocast_dtype(evaluation.loaded.backbone.device) or torch.float32),
    }
