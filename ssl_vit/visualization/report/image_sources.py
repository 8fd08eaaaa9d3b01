"""Choose the images of a report, and load or extract their features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pydantic import ValidationError

from ssl_vit.config.evaluate import EvalDataConfig
from ssl_vit.config.visualize import ReportConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset, evenly_spaced
from ssl_vit.data.dataset_factory import TrainTestSplit, build_feature_splits
from ssl_vit.data.sources.image_folder import load_images_at
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.evaluator import BLOCKS
from ssl_vit.evaluation.features.cache import FeatureCache, candidate_caches, features_folder
from ssl_vit.evaluation.features.extractor import BackboneExtractor, check_size, extract, validate_features
from ssl_vit.evaluation.features.feature_export import FeatureSplit
from ssl_vit.evaluation.results.provenance import data_name
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.report.run_results import RunFolder

NO_IMAGES = "Name images: images=FOLDER, or labeled ones: data.root=FOLDER."


class GalleryImages(NamedTuple):
    """Images of the attention gallery, and the folder of their masks if there is one."""

    dataset: ImageDataset
    masks: Path | None
    text: str  # which they are


class FeatureImages(NamedTuple):
    """Images with their features."""

    bank: FeatureSplit  # to search in
    asked: FeatureSplit | None  # to search for; None: the bank itself
    text: str  # which they are, and where their features are from


def shown_images(run: RunFolder, config: ReportConfig) -> GalleryImages:
    """Choose the named images; else those of the run's attention result; else the run's own; else the labeled ones.

    Raises:
        UserError: There are none any more.
    """
    if config.images is not None:
        return GalleryImages(load_images_at(config.images), config.masks, f"of {config.images}")
    for record in run.records:
        given = record.data
        if record.task == "attention" and Path(str(given.get("images"))).exists():
            masks = given.get("masks")
            dataset = load_images_at(Path(str(given.get("images"))))
            return GalleryImages(dataset, None if masks is None else Path(str(masks)), f"of {record.data.name}")
    try:
        return GalleryImages(build_feature_splits(_own(run, config)).train, None, "that the run has learned from")
    except UserError as error:
        if not config.data.named:
            raise UserError(f"The run's own images are not there: {error}. {NO_IMAGES}") from None
    return GalleryImages(build_feature_splits(config.data).train, None, "of the labeled set")


def known_images(run: RunFolder, config: ReportConfig) -> FeatureImages:
    """Choose the named labeled images; else those of the run's newest evaluation; else the run's own.

    Features that an evaluation has stored are taken. Otherwise `config.points` images, evenly spread, are described.

    Raises:
        UserError: There are none any more, or the model or its features are of no use.
    """
    run.model.backbone.require_cls()
    if config.data.named:
        return _known(run, config, config.data)
    for record in sorted(run.records, key=lambda record: record.created, reverse=True):
        try:
            data = EvalDataConfig.model_validate(record.config["data"])
            return _known(run, config, data)
        except (LookupError, ValidationError, UserError):  # an older record, or images that are gone since
            continue
    try:
        return _known(run, config, _own(run, config))
    except UserError as error:
        raise UserError(f"{error}. {NO_IMAGES}") from None


@contextmanager
def skipped_list() -> Iterator[SkippedImageLog]:
    """Provide a log of unreadable images for the duration of the block."""
    with TemporaryDirectory() as folder:
        yield SkippedImageLog(Path(folder) / "skipped_images.txt")


def skipped_text(skipped: SkippedImageLog) -> str:
    """How many, and the first of them; nothing where there is none."""
    if not (count := skipped.count()):
        return ""
    name, _, reason = skipped.path.read_text(encoding="utf-8").splitlines()[0].partition("\t")
    return f" {count:,} could not be used, the first is {name}: {reason}."


def _own(run: RunFolder, config: ReportConfig) -> EvalDataConfig:
    """Return the images that the run trained on.

    Raises:
        UserError: config.yaml does not say which.
    """
    own = {name: run.value(f"data.{name}") for name in ("source", "root", "train")}
    try:
        return EvalDataConfig.model_validate({**config.data.model_dump(), **own, "test": None})
    except ValidationError:
        raise UserError("config.yaml does not say which images the run has learned from") from None


def _known(run: RunFolder, config: ReportConfig, data: EvalDataConfig) -> FeatureImages:
    loaded = run.model
    size = data.image_size or loaded.backbone.config.img_size
    check_size(size, loaded.backbone.patch_size)
    transform = EvalTransform(size, data.crop_ratio, loaded.mean, loaded.std)
    split = build_feature_splits(data)
    describe = BackboneExtractor(loaded, transform, blocks=min(BLOCKS, loaded.backbone.num_blocks))
    stores = _stored(describe, split, features_folder(config.features, run.path), data_name(data))
    if stores is None:
        return _described_now(run, config, split.train, transform)
    names = ("train", "test")
    parts = [
        FeatureSplit(name, store.dataset, store.features(blocks=1)) for name, store in zip(names, stores, strict=False)
    ]
    for part in parts:
        validate_features(part.features, loaded.source)
    text = f"stored features of {' and '.join(part.dataset.describe() for part in parts)}."
    return FeatureImages(parts[0], parts[1] if len(parts) > 1 else None, text)


def _stored(describe: BackboneExtractor, split: TrainTestSplit, folder: Path, name: str) -> list[FeatureCache] | None:
    """Return the complete caches of all parts; None if one is missing."""
    if not folder.is_dir():
        return None
    found = []
    for part, dataset in zip(TrainTestSplit._fields, split, strict=True):
        if dataset is None:
            continue
        candidates = candidate_caches(describe, dataset, folder=folder, name=f"{name}-{part}")
        whole = next((store for store in candidates if store.complete() and not store.validate()), None)
        if whole is None:
            return None
        found.append(whole)
    return found


def _described_now(
    run: RunFolder, config: ReportConfig, dataset: ImageDataset, transform: EvalTransform
) -> FeatureImages:
    """Extract the features of evenly spaced images, each searched for among the others."""
    places = evenly_spaced(len(dataset), config.points)
    some = dataset if len(places) == len(dataset) else Subset(dataset, places)
    with skipped_list() as skipped:
        features = extract(
            BackboneExtractor(run.model, transform, blocks=1),
            some,
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
            skipped=skipped,
        )
        left_out = skipped_text(skipped)
    validate_features(features, run.model.source)
    return FeatureImages(
        FeatureSplit("train", some, features),
        None,
        f"features, described for this page, of {some.describe()}.{left_out}",
    )
