"""The published linear evaluations of DINO and SiT: frozen features of images augmented in each epoch; resumable."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_vit.config.evaluate import LinearConfig
from ssl_vit.config.pretrain import PretrainDataConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.loading.loader import InMemoryLoader, TrainingLoader, build_eval_loader, build_train_loader
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.mixup import MixupCutmix, RandAugment, single_view_config
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.evaluation.classification.knn import rank_of_true_class
from ssl_vit.evaluation.evaluator import MODEL, Evaluation
from ssl_vit.evaluation.features.extractor import on_best_device
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores, Predictions, sibling_path, topk_metrics
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.device import autocast_dtype
from ssl_vit.runtime.errors import RankFinished, UserError
from ssl_vit.runtime.jsonl import JSONLWriter
from ssl_vit.runtime.launch import torchrun_rank
from ssl_vit.runtime.progress import progress_bar
from ssl_vit.runtime.rng import seeded_global_rng
from ssl_vit.training.probe_state import ProbeState, exclusive_lock, read_state, resume, save_state
from ssl_vit.training.published_protocols import PROBES, Probe

_SKIPPED = "skipped_images.txt"  # training images that could not be read
_LAST = ", last epoch"  # how the metrics are called that nothing was chosen for
_MEMORY_GB = 2.0  # data sets that fit into this stay in memory


def published_probe(config: LinearConfig) -> tuple[EvalResult, Evaluation]:
    """Train the heads of `config.protocol`, or go on where they stand; the record, and its file.

    The same command resumes from the state saved after every epoch, in a folder per seed beside the result.

    Raises:
        UserError: Model and images do not fit the protocol, or the folder holds another probe.
        RankFinished: Another process of this launch does it.
    """
    if torchrun_rank()[0]:
        raise RankFinished
    study = Evaluation.start(f"linear-{config.protocol}", config)
    dataset, test = study.dataset
    if test is None:
        raise UserError(
            f"protocol={config.protocol} is chosen on test images: data.root needs train/ and val/ or test/"
        )
    with seeded_global_rng() as seed:
        seed(config.seed)
        probe = PROBES[config.protocol](
            study.loaded.backbone, len(dataset.classes), epochs=config.epochs, batch_size=config.data.batch_size
        )
    backbone = on_best_device(study.loaded).backbone
    device = next(backbone.parameters()).device
    probe.heads.to(device)
    folder, protocol = _folder(study), _protocol(config, probe)
    identity = _identity(study, protocol, device)
    with exclusive_lock(folder):
        before = read_state(folder, identity)
        skipped = [SkippedImageLog(folder / name) for name in (_SKIPPED, "skipped_test_images.txt")]
        skipped[1].path.unlink(missing_ok=True)
        features, index = _features(study, test, probe, backbone, skipped[1])
        course, labels = resume(before, probe, index), test.labels[index]
        if course.epoch == 0:
            skipped[0].path.unlink(missing_ok=True)
        if before and course.epoch == 0:
            print(f"{folder}: other test images can be read than before; the probe starts from scratch")
        if course.epoch == probe.epochs:
            print(f"{folder} is complete already")
        else:
            _learn(config, study, probe, course, features, labels, save=partial(save_state, folder, probe, identity))
    score = _score(probe, course, labels, index, len(dataset.classes), folder)
    warnings = [
        "chosen on the test images, as published: the first accuracy of each head is the best over the epochs, "
        "too high by design; 'last epoch' is not chosen"
    ]
    if unread := sum(part.count() for part in skipped):
        warnings.append(f"{unread:,} images could not be read: {folder / 'skipped*.txt'}")
    record = study.write_result(
        [score],
        protocol=protocol,
        train_labels=dataset.labels,
        test_labels=labels,
        data_info={"skipped": unread},
        warnings=warnings,
        selection={"on": "test images", "chosen": {"epoch": score.details["best_epoch"]}},
        confusion_of=next(suffix for suffix in score.predictions if suffix.endswith(_LAST)),
        figure=config.figure,
    )
    return record, study


def _learn(
    config: LinearConfig,
    study: Evaluation,
    probe: Probe,
    course: ProbeState,
    test: list[Tensor],
    labels: Tensor,
    *,
    save: partial[None],
) -> None:
    """Train to the end, looking at the test images as often as the protocol does."""
    backbone = study.loaded.backbone
    device = next(backbone.parameters()).device
    folder = _folder(study)
    views = single_view_config(probe.augmentation, study.transform.image_size, study.loaded.mean, study.loaded.std)
    change, mix = ColorAugmentation(views), MixupCutmix(probe.augmentation, len(study.dataset.train.classes))
    loader = _loader(config, study, probe, SkippedImageLog(folder / _SKIPPED))
    journal = JSONLWriter(folder / "epochs.jsonl", course.epoch)
    for epoch in progress_bar(range(course.epoch, probe.epochs), initial=course.epoch, total=probe.epochs):
        started, losses = time.perf_counter(), []
        for group in probe.optimizer.param_groups:
            group["lr"] = probe.lr(epoch)
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for batch in loader:
            images = change(batch.global_views.to(device), batch.key).squeeze(1)  # (B, C, H, W)
            images, targets = mix(images, batch.label.to(device), batch.key)
            loss = probe.loss(_frozen(probe, backbone, images), targets)
            probe.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            probe.optimizer.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        if not mean < float("inf"):
            raise UserError(f"protocol={config.protocol}: the loss is not finite in epoch {epoch + 1}")
        course.epoch = epoch + 1
        line: dict[str, Any] = {"lr": probe.lr(epoch), "loss": mean}
        if course.epoch % probe.every == 0 or course.epoch == probe.epochs:
            line["test"] = _look(probe, course, test, labels)
        course.seconds += time.perf_counter() - started
        journal.write(epoch, **line)
        save(course)


def _loader(
    config: LinearConfig, study: Evaluation, probe: Probe, skipped: SkippedImageLog
) -> InMemoryLoader | TrainingLoader:
    """Cropped and flipped training images, with RandAugment where the protocol has it."""
    loaded, size, dataset = study.loaded, study.transform.image_size, study.dataset.train
    backbone = loaded.backbone
    rand_augment = probe.augmentation.rand_augment
    return build_train_loader(
        dataset,
        MultiCrop(single_view_config(probe.augmentation, size, loaded.mean, loaded.std)),
        PretrainDataConfig(
            source=config.data.source,
            root=config.data.root or config.data.train or Path(),
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
            cache_gb=_MEMORY_GB,
        ),
        seed=config.seed,
        channels=backbone.config.in_chans,
        rank=0,
        world=1,
        accumulate=1,
        first_step=0,
        skipped=skipped,
        device=next(backbone.parameters()).device,
        augment=RandAugment(rand_augment, size=size, mean=loaded.mean) if rand_augment.layers else None,
    )


def _frozen(probe: Probe, backbone: Backbone, images: Tensor) -> list[Tensor]:
    """Return the probe's features (B, D) float32 of normalized images, without gradient."""
    device = images.device.type
    dtype = autocast_dtype(images.device)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
        return [feature.float() for feature in probe.features(backbone, images)]


def _features(
    study: Evaluation, dataset: ImageDataset, probe: Probe, backbone: Backbone, skipped: SkippedImageLog
) -> tuple[list[Tensor], Tensor]:
    """Return the probe's features (N, D) of all readable images, without augmentation, and their indices (N,)."""
    data, device = study.config.data, next(backbone.parameters()).device
    loader = build_eval_loader(
        dataset,
        study.transform,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        channels=backbone.config.in_chans,
        skipped=skipped,
    )
    rows, places = [], []
    for batch, index in loader:
        rows.append(_frozen(probe, backbone, study.transform.normalize(batch.to(device))))
        places.append(index)
    return [torch.cat(parts) for parts in zip(*rows, strict=True)], torch.cat(places)


@torch.no_grad()
def _look(probe: Probe, course: ProbeState, test: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Evaluate each head on the test images, and keep the predictions of its best evaluation."""
    found = {}
    for head in probe.heads:
        logits = probe.logits(head, test).cpu()
        answers = torch.stack([rank_of_true_class(labels, logits), logits.argmax(dim=1)])  # (2, Q)
        accuracy = float((answers[0] == 0).float().mean())
        before = course.accuracy.setdefault(head, [])
        if all(accuracy > other for _, other in before):
            course.best[head] = answers
        course.last[head] = answers
        before.append((course.epoch, accuracy))
        found[head] = accuracy
    return found


def _score(probe: Probe, course: ProbeState, labels: Tensor, index: Tensor, classes: int, folder: Path) -> ModelScores:
    metrics, answers = [], {}
    for head in probe.heads:
        name = f", {head}" if len(probe.heads) > 1 else ""
        for suffix, (ranks, predicted) in ((name, course.best[head]), (f"{name}{_LAST}", course.last[head])):
            metrics += topk_metrics(ranks, classes, suffix)
            answers[suffix] = Predictions(index, labels, predicted, ranks)
    best = {head: max(looks, key=lambda look: look[1])[0] for head, looks in course.accuracy.items()}
    details = {"best_epoch": best, "looks": course.accuracy, "seconds": round(course.seconds, 1), "run": str(folder)}
    return ModelScores(name=MODEL, metrics=metrics, details=details, predictions=answers)


def _protocol(config: LinearConfig, probe: Probe) -> dict[str, Any]:
    looks = -(-probe.epochs // probe.every)
    return {
        "probe": config.protocol,
        **probe.about,
        "epochs": probe.epochs,
        "batch_size": config.data.batch_size,
        "selection": f"on the test images: the best of {looks} looks at them, as published",
        "split": "train and test",
    }


def _identity(study: Evaluation, protocol: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what a probe must share with a saved one to resume it."""
    return {
        "protocol": repr(protocol),
        "model": f"{study.loaded.source} {study.loaded.sha256}",
        "dataset": [part.fingerprint(sizes=True) for part in study.dataset if part is not None],
        "transform": repr(study.transform.describe()),
        "seed": study.config.seed,
        "precision of the model": str(autocast_dtype(device) or torch.float32),
    }


def _folder(study: Evaluation) -> Path:
    """Return the folder of the probe's state, one per seed."""
    return sibling_path(study.out, f"-seed{study.config.seed}")
