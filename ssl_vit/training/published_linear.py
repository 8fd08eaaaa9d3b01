"""The published linear evaluations of DINO and SiT, as runs: frozen features of images augmented in each epoch."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_vit.config.evaluate import LinearConfig
from ssl_vit.config.pretrain import RunDirConfig
from ssl_vit.data.batch import Batch
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.loading.loader import EvalLoader
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.mixup import MixupCutmix, single_view_config
from ssl_vit.evaluation.evaluator import MODEL, Evaluation
from ssl_vit.evaluation.features.extractor import on_best_device
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores, Predictions, sibling_path, topk_metrics
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.models.checkpoint import set_epoch_counts
from ssl_vit.models.official_checkpoints import torch_load_weights_only
from ssl_vit.runtime.atomic_io import JSONLWriter, write_json
from ssl_vit.runtime.device import autocast_dtype
from ssl_vit.runtime.errors import RankFinished, UserError
from ssl_vit.runtime.launch import torchrun_rank
from ssl_vit.runtime.rng import seeded_global_rng
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.checkpointing import resume_point
from ssl_vit.training.data_module import labeled_train_loader
from ssl_vit.training.loop import fit
from ssl_vit.training.published_protocols import PROBES, TRAINER, Probe, ProbeEvaluation, TestFeatures
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
    protocol = {
        "probe": config.protocol,
        **probe.about,
        "epochs": probe.epochs,
        "batch_size": config.data.batch_size,
        "selection": f"on the test images: the best of {-(-probe.epochs // probe.every)} looks at them, as published",
        "split": "train and test",
    }
    folder = sibling_path(evaluation.out, f"-seed{config.seed}")
    run = RunDirConfig(name=folder.name, folder=folder.parent, resume=True, overwrite=False)
    with lock_run_dir(run, alternative="out=OTHER.json"):
        folder.mkdir(exist_ok=True)
        tested, skipped = _train(config, evaluation, probe, _identity(evaluation, protocol), folder)
    score = _score(tested, classes, folder)
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
        test_labels=tested.test.labels,
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
        self.heads = nn.ModuleDict(probe.heads)
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
    train = evaluation.dataset.train
    skipped = [SkippedImageLog(folder / name) for name in ("skipped_images.txt", "skipped_test_images.txt")]
    skipped[1].path.unlink(missing_ok=True)
    steps_per_epoch = max(1, len(train) // config.data.batch_size)
    module = LinearProbe(probe, evaluation, steps_per_epoch=steps_per_epoch)
    features = _test_features(module, evaluation, skipped[1])
    _check_identity(folder, identity, features.index)
    found, notes = resume_point(folder / "checkpoints", otherwise=f"delete {folder} to start from scratch")
    plan = TrainingPlan(probe.epochs * steps_per_epoch, steps_per_epoch, config.data.batch_size, 1, config.seed)
    run = RunState(folder, train, train, plan, resume_with="the same command")
    if found:
        run = run._replace(checkpoint=found.path, done=found.step)
    else:
        skipped[0].path.unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    for note in notes:
        print(note)
    journal = JSONLWriter(folder / "epochs.jsonl", run.done // steps_per_epoch)
    tested = ProbeEvaluation(probe, features, journal)
    if found and found.step == plan.total_steps:
        print(f"{folder} is already complete")
        tested.load_state_dict(torch_load_weights_only(found.path)["callbacks"][tested.state_key])
        return tested, skipped
    loader = labeled_train_loader(
        train,
        module.views,
        config.data,
        probe.augmentation.rand_augment,
        seed=config.seed,
        channels=evaluation.loaded.backbone.config.in_chans,
        cache_gb=_CACHE_GB,
    )
    result = fit(module, run, loader, TRAINER, [tested], skipped=skipped[0])
    if not result.complete:
        print(result.stop_message())
        result.requeue_job()
        raise KeyboardInterrupt
    return tested, skipped


def _test_features(module: LinearProbe, evaluation: Evaluation, skipped: SkippedImageLog) -> TestFeatures:
    """Extract the probe's features of all readable test images."""
    data, backbone = evaluation.config.data, evaluation.loaded.backbone
    loader = EvalLoader(
        evaluation.test_images,
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
    features, index = [torch.cat(parts) for parts in zip(*rows, strict=True)], torch.cat(indices)
    return TestFeatures(features, evaluation.test_images.labels[index], index)


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


def _score(tested: ProbeEvaluation, classes: int, folder: Path) -> ModelScores:
    metrics, predictions = [], {}
    for head in tested.probe.heads:
        name = f", {head}" if len(tested.probe.heads) > 1 else ""
        for suffix, (ranks, predicted) in ((name, tested.best[head]), (f"{name}{_LAST}", tested.last[head])):
            metrics += topk_metrics(ranks, classes, suffix)
            predictions[suffix] = Predictions(tested.test.index, tested.test.labels, predicted, ranks)
    best = {head: max(points, key=lambda point: point[1])[0] for head, points in tested.accuracy.items()}
    details = {"best_epoch": best, "looks": tested.accuracy, "seconds": round(tested.seconds, 1), "run": str(folder)}
    return ModelScores(name=MODEL, metrics=metrics, details=details, predictions=predictions)
