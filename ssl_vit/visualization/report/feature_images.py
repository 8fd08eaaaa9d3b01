"""The images of the feature map and of the neighbors, with cached or newly extracted features."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from PIL import Image
from pydantic import ValidationError

from ssl_vit.config.evaluate import EvalDataConfig
from ssl_vit.config.visualize import ReportConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset, evenly_spaced
from ssl_vit.data.dataset_factory import TrainTestSplit, build_feature_splits
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.evaluator import BLOCKS
from ssl_vit.evaluation.features.cache import candidate_caches, features_folder
from ssl_vit.evaluation.features.extractor import BackboneExtractor, check_size, extract, validate_features
from ssl_vit.evaluation.features.feature_export import FeatureSplit
from ssl_vit.evaluation.results.provenance import data_name
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.image_grid import fit_size, to_pil
from ssl_vit.visualization.report.run_reader import RunContent

NO_IMAGES = "Name images: images=FOLDER, or labeled ones: data.root=FOLDER."


class FeatureImages(NamedTuple):
    """Images with their features."""

    index_set: FeatureSplit  # to search in
    queries: FeatureSplit | None  # to search for; None: the index set itself
    text: str  # which they are, and where their features are from


def load_feature_images(run: RunContent, config: ReportConfig) -> FeatureImages:
    """Choose the named labeled images; else those of the run's newest evaluation; else the run's own.

    Cached features of an evaluation are used. Otherwise those of `config.points` evenly spaced images are extracted.

    Raises:
        UserError: The images no longer exist, or the model or its features are of no use.
    """
    run.model.backbone.require_cls()
    if config.data.named:
        return _load(run, config, config.data)
    for result in reversed(run.results):
        try:
            return _load(run, config, EvalDataConfig.model_validate(result.config["data"]))
        except (LookupError, ValidationError, UserError):  # an older result, or images that are gone since
            continue
    try:
        return _load(run, config, trained_images(run, config))
    except UserError as error:
        raise UserError(f"{error}. {NO_IMAGES}") from None


def trained_images(run: RunContent, config: ReportConfig) -> EvalDataConfig:
    """Return the images that the run trained on.

    Raises:
        UserError: config.yaml does not name them.
    """
    own = {name: run.value(f"data.{name}") for name in ("source", "root", "train")}
    try:
        return EvalDataConfig.model_validate({**config.data.model_dump(), **own, "test": None})
    except ValidationError:
        raise UserError("config.yaml does not say which images the run has learned from") from None


def skipped_text(skipped: SkippedImageLog) -> str:
    """Return how many images were skipped, and the first of them; nothing if there is none."""
    if not (count := skipped.count()):
        return ""
    name, _, reason = skipped.path.read_text(encoding="utf-8").splitlines()[0].partition("\t")
    return f" {count:,} could not be used, the first is {name}: {reason}."


def read_thumbnail(dataset: ImageDataset, index: int, side: int) -> Image.Image:
    """Read an image with its longer side reduced to `side` pixels, decoded no larger than that needs.

    Raises:
        UnreadableImageError: It cannot be read.
    """
    image = dataset.read(
        index, 3, lambda height, width: max(f for f in (1, 2, 4, 8) if f == 1 or min(height, width) >= f * side)
    )
    return to_pil(image, fit_size(image, min(side, max(image.shape[-2:]))))


def _load(run: RunContent, config: ReportConfig, data: EvalDataConfig) -> FeatureImages:
    loaded = run.model
    size = data.image_size or loaded.backbone.config.img_size
    check_size(size, loaded.backbone.patch_size)
    transform = EvalTransform(size, data.crop_ratio, loaded.mean, loaded.std)
    dataset = build_feature_splits(data)
    extractor = BackboneExtractor(loaded, transform, blocks=min(BLOCKS, loaded.backbone.num_blocks))
    splits = _load_cached(extractor, dataset, features_folder(config.features, run.path), data_name(data))
    if splits is None:
        return _extract(run, config, dataset.train, transform)
    for split in splits:
        validate_features(split.features, loaded.source)
    text = f"stored features of {' and '.join(split.dataset.describe() for split in splits)}."
    return FeatureImages(splits[0], splits[1] if len(splits) > 1 else None, text)


def _load_cached(
    extractor: BackboneExtractor, dataset: TrainTestSplit, folder: Path, name: str
) -> list[FeatureSplit] | None:
    """Return the cached features of all parts; None if one is missing."""
    if not folder.is_dir():
        return None
    splits = []
    for part, images in dataset._asdict().items():
        if images is None:
            continue
        caches = candidate_caches(extractor, images, folder=folder, name=f"{name}-{part}")
        complete = next((cache for cache in caches if cache.complete() and not cache.validate()), None)
        if complete is None:
            return None
        splits.append(FeatureSplit(part, images, complete.features(blocks=1)))
    return splits


def _extract(run: RunContent, config: ReportConfig, dataset: ImageDataset, transform: EvalTransform) -> FeatureImages:
    """Extract the features of evenly spaced images, each searched for among the others."""
    indices = evenly_spaced(len(dataset), config.points)
    images = dataset if len(indices) == len(dataset) else Subset(dataset, indices)
    with TemporaryDirectory() as folder:
        skipped = SkippedImageLog(Path(folder) / "skipped_images.txt")
        features = extract(
            BackboneExtractor(run.model, transform, blocks=1),
            images,
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
            skipped=skipped,
        )
        excluded = skipped_text(skipped)
    validate_features(features, run.model.source)
    text = f"features, described for this page, of {images.describe()}.{excluded}"
    return FeatureImages(FeatureSplit("train", images, features), None, text)
