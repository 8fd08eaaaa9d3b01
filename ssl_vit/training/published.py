"""Linear evaluation as it was published: frozen features of pictures augmented anew in each epoch; resumable."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_vit.config import PretrainDataConfig
from ssl_vit.config_evaluation import LinearConfig
from ssl_vit.data.loading import ResidentLoader, TrainingLoader, eval_loader, training_loader
from ssl_vit.data.pictures import Pictures, SkippedPictures
from ssl_vit.errors import PartDone, UserError
from ssl_vit.evaluation.features import on_best_device
from ssl_vit.evaluation.knn import rank_of
from ssl_vit.evaluation.study import NETWORK, Study
from ssl_vit.models.backbone import Backbone
from ssl_vit.processes import place_in_launch
from ssl_vit.records.record import Answers, Record, Score, accuracies, beside
from ssl_vit.training.course import Course, alone, read_state, resume, save_state
from ssl_vit.training.hardware import autocast_dtype
from ssl_vit.training.journal import Journal
from ssl_vit.training.protocols import PROBES, Probe
from ssl_vit.transforms.augment import Mixing, RandAugment, crop_views
from ssl_vit.transforms.crops import MultiCrop
from ssl_vit.transforms.photometric import Photometric
from ssl_vit.transforms.randomness import library_randomness

_SKIPPED = "skipped.txt"  # training pictures that could not be read
_LAST = ", last epoch"  # how the metrics are called that nothing was chosen for
_MEMORY_GB = 2.0  # data sets that fit into this stay in memory


def published_probe(config: LinearConfig) -> tuple[Record, Path]:
    """Train the heads of `config.protocol`, or go on where they stand; the record, and its file.

    The same command goes on from the state that is saved after every epoch, in a folder per seed beside the record.

    Raises:
        UserError: Network and pictures do not fit the protocol, or the folder holds another probe.
        PartDone: Another process of this launch does it.
    """
    if place_in_launch()[0]:
        raise PartDone
    study = Study.begin(f"linear-{config.protocol}", config)
    pictures, test = study.pictures
    if test is None:
        raise UserError(
            f"protocol={config.protocol} is chosen on test pictures: data.root needs train/ and val/ or test/"
        )
    with library_randomness() as seed:
        seed(config.seed)
        probe = PROBES[config.protocol](
            study.loaded.backbone, len(pictures.classes), epochs=config.epochs, batch_size=config.data.batch_size
        )
    backbone = on_best_device(study.loaded).backbone
    device = next(backbone.parameters()).device
    probe.heads.to(device)
    folder, protocol = _folder(study), _protocol(config, probe)
    identity = _identity(study, protocol, device)
    with alone(folder):
        before = read_state(folder, identity)
        skipped = [SkippedPictures(folder / name) for name in (_SKIPPED, "skipped_test.txt")]
        skipped[1].path.unlink(missing_ok=True)
        features, index = _features(study, test, probe, backbone, skipped[1])
        course, labels = resume(before, probe, index), test.labels[index]
        if course.epoch == 0:
            skipped[0].path.unlink(missing_ok=True)
        if before and course.epoch == 0:
            print(f"{folder}: other test pictures can be read than before; the probe starts anew")
        if course.epoch == probe.epochs:
            print(f"{folder} is complete already")
        else:
            _learn(config, study, probe, course, features, labels, save=partial(save_state, folder, probe, identity))
    score = _score(probe, course, labels, index, len(pictures.classes), folder)
    warnings = [
        "chosen on the test pictures, as published: the first accuracy of each head is the best over the epochs, "
        "too high by design; 'last epoch' is not chosen"
    ]
    if unread := sum(part.count() for part in skipped):
        warnings.append(f"{unread:,} pictures could not be read: {folder / 'skipped*.txt'}")
    record = study.finish(
        [score],
        protocol=protocol,
        train_labels=pictures.labels,
        test_labels=labels,
        findings={"skipped": unread},
        warnings=warnings,
        selection={"on": "test pictures", "chosen": {"epoch": score.details["best_epoch"]}},
        by_class=next(suffix for suffix in score.answers if suffix.endswith(_LAST)),
        sheet=config.sheet,
    )
    return record, study.out


def _learn(
    config: LinearConfig,
    study: Study,
    probe: Probe,
    course: Course,
    test: list[Tensor],
    labels: Tensor,
    *,
    save: partial[None],
) -> None:
    """Train to the end, looking at the test pictures as often as the protocol does."""
    backbone = study.loaded.backbone
    device = next(backbone.parameters()).device
    folder = _folder(study)
    views = crop_views(probe.augmentation, study.transform.image_size, study.loaded.mean, study.loaded.std)
    change, mix = Photometric(views), Mixing(probe.augmentation, len(study.pictures.train.classes))
    loader = _loader(config, study, probe, SkippedPictures(folder / _SKIPPED))
    journal = Journal(folder / "epochs.jsonl", course.epoch)
    for epoch in tqdm(range(course.epoch, probe.epochs), initial=course.epoch, total=probe.epochs, disable=None):
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
    config: LinearConfig, study: Study, probe: Probe, skipped: SkippedPictures
) -> ResidentLoader | TrainingLoader:
    """Cropped and flipped training pictures, with RandAugment where the protocol has it."""
    loaded, size, pictures = study.loaded, study.transform.image_size, study.pictures.train
    backbone = loaded.backbone
    rand_augment = probe.augmentation.rand_augment
    return training_loader(
        pictures,
        MultiCrop(crop_views(probe.augmentation, size, loaded.mean, loaded.std)),
        PretrainDataConfig(
            source=config.data.source,
            root=config.data.root or config.data.train or Path(),
            batch_size=config.data.batch_size,
            workers=config.data.workers,
            memory_gb=_MEMORY_GB,
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
    """The probe's features (B, D) float32 of pictures that are normalised, without gradient."""
    device = images.device.type
    dtype = autocast_dtype(images.device)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
        return [feature.float() for feature in probe.features(backbone, images)]


def _features(
    study: Study, pictures: Pictures, probe: Probe, backbone: Backbone, skipped: SkippedPictures
) -> tuple[list[Tensor], Tensor]:
    """The probe's features (N, D) of all pictures that can be read, not augmented, and their places (N,)."""
    data, device = study.config.data, next(backbone.parameters()).device
    loader = eval_loader(
        pictures,
        study.transform,
        batch_size=data.batch_size,
        workers=data.workers,
        channels=backbone.config.in_chans,
        skipped=skipped,
    )
    rows, places = [], []
    for batch, index in loader:
        rows.append(_frozen(probe, backbone, study.transform.normalise(batch.to(device))))
        places.append(index)
    return [torch.cat(parts) for parts in zip(*rows, strict=True)], torch.cat(places)


@torch.no_grad()
def _look(probe: Probe, course: Course, test: list[Tensor], labels: Tensor) -> dict[str, float]:
    """The accuracy of each head on the test pictures; the answers of its best look so far are kept."""
    found = {}
    for head in probe.heads:
        logits = probe.logits(head, test).cpu()
        answers = torch.stack([rank_of(labels, logits), logits.argmax(dim=1)])  # (2, Q)
        accuracy = float((answers[0] == 0).float().mean())
        before = course.accuracy.setdefault(head, [])
        if all(accuracy > other for _, other in before):
            course.best[head] = answers
        course.last[head] = answers
        before.append((course.epoch, accuracy))
        found[head] = accuracy
    return found


def _score(probe: Probe, course: Course, labels: Tensor, index: Tensor, classes: int, folder: Path) -> Score:
    metrics, answers = [], {}
    for head in probe.heads:
        name = f", {head}" if len(probe.heads) > 1 else ""
        for suffix, (ranks, predicted) in ((name, course.best[head]), (f"{name}{_LAST}", course.last[head])):
            metrics += accuracies(ranks, classes, suffix)
            answers[suffix] = Answers(index, labels, predicted, ranks)
    best = {head: max(looks, key=lambda look: look[1])[0] for head, looks in course.accuracy.items()}
    details = {"best_epoch": best, "looks": course.accuracy, "seconds": round(course.seconds, 1), "run": str(folder)}
    return Score(NETWORK, metrics, details, answers)


def _protocol(config: LinearConfig, probe: Probe) -> dict[str, Any]:
    looks = -(-probe.epochs // probe.every)
    return {
        "probe": config.protocol,
        **probe.about,
        "epochs": probe.epochs,
        "batch_size": config.data.batch_size,
        "selection": f"on the test pictures: the best of {looks} looks at them, as published",
        "split": "train and test",
    }


def _identity(study: Study, protocol: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a probe must share with another one to go on with it."""
    return {
        "protocol": repr(protocol),
        "network": f"{study.loaded.source} {study.loaded.sha256}",
        "set of pictures": [part.fingerprint(sizes=True) for part in study.pictures if part is not None],
        "transform": repr(study.transform.describe()),
        "seed": study.config.seed,
        "precision of the network": str(autocast_dtype(device) or torch.float32),
    }


def _folder(study: Study) -> Path:
    """What goes on: a probe of another seed is another one."""
    return beside(study.out, f"-seed{study.config.seed}")
