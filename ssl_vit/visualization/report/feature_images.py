"""Features of a run's images, cached or newly extracted: nearest neighbors, and the feature map."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from ssl_vit.config.evaluate import EvalDataConfig
from ssl_vit.config.visualize import ReportConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset, UnreadableImageError, evenly_spaced
from ssl_vit.data.dataset_factory import TrainTestSplit, build_feature_splits
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification.nearest_neighbors import Neighbors, choose_engine, exact_search
from ssl_vit.evaluation.evaluator import BLOCKS
from ssl_vit.evaluation.features.cache import candidate_caches, features_folder
from ssl_vit.evaluation.features.extractor import BackboneExtractor, check_size, extract, validate_features
from ssl_vit.evaluation.features.feature_export import FeatureSplit
from ssl_vit.evaluation.results.provenance import data_name
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.image_grid import fit_size, to_pil
from ssl_vit.visualization.report.report_data import EmbeddingMap, NeighborImage
from ssl_vit.visualization.report.run_reader import RunContent

MAX_QUERIES = 500  # images among which rows of neighbors are chosen
MAX_INDEX = 1 << 17  # images that are searched
EVEN, FAILURES = 8, 4  # rows
NEIGHBOR_SIDE, POINT_SIDE = 96, 40  # pixels of a thumbnail
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
            return _load(run, config, EvalDataConfig.model_validate({"range": None, **result.config["data"]}))
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


def neighbor_rows(images: FeatureImages, k: int) -> tuple[list[list[NeighborImage]], str, str]:
    """Find the k nearest images of evenly spaced ones, then of those whose neighbors are most often of another class.

    Returns:
        The rows, which they are, and how they were found.

    Raises:
        UserError: There are too few images.
    """
    index = _take(images.index_set, MAX_INDEX)
    queries = _take(images.queries or index, MAX_QUERIES)
    own = None if images.queries else evenly_spaced(len(index.features.index), MAX_QUERIES)
    k = min(k, len(index.features.index) - (own is not None))
    if k < 1:
        raise UserError("One image has no neighbors.")
    found = _search(queries.features.cls[:, -1], index.features.cls[:, -1], k, own)
    labels = queries.features.labels[:, None]
    right = (index.features.labels[found.indices] == labels) & (labels >= 0)  # (Q, k)
    labeled = bool(index.dataset.classes)
    even = evenly_spaced(len(right), EVEN).tolist()
    failures = _failures(right, found, even) if labeled else []
    rows = [_row(queries, index, found, row) for row in (*even, *failures)]
    text = f"The first {len(even)} rows are evenly spread over {len(right):,} images."
    if labeled:
        text += f" The last {len(failures)} are failures: those of them with the fewest neighbors of their own class."
        share = f"{100 * float(right[:, 0].float().mean()):.0f} %"
        text += f" Of all {len(right):,}, {share} have their nearest neighbor in their own class."
    protocol = f"Cosine of the [CLS] of the last block; searched exactly among {len(index.features.index):,} images: "
    protocol += images.text + ("" if own is None else " An image is not its own neighbor.")
    return [row for row in rows if len(row) > 1], text, protocol


def embedding_map(images: FeatureImages, config: ReportConfig) -> EmbeddingMap:
    """Project the features of at most `config.points` evenly spaced images.

    Raises:
        UserError: There are too few images, or scikit-learn is missing.
    """
    split = images.queries or images.index_set
    features = split.features.take(evenly_spaced(len(split.features.index), config.points))
    thumbnails, rows = [], []
    for row, index in enumerate(features.index.tolist()):
        try:
            thumbnails.append(read_thumbnail(split.dataset, index, POINT_SIDE))
        except UnreadableImageError:
            continue
        rows.append(row)
    if len(rows) < 3:
        raise UserError("Fewer than three images can be read: there is nothing to spread over a plane.")
    kept = features.take(torch.tensor(rows))
    vectors = F.normalize(kept.cls[:, -1].float(), dim=1)
    points, text = _pca(vectors) if config.projection == "pca" else _tsne(vectors, config.seed)
    names = [split.dataset.name(index) for index in kept.index.tolist()]
    text = f"{text} {len(rows):,} images, evenly spread; [CLS] of the last block, scaled to length 1."
    return EmbeddingMap(points, kept.labels, split.dataset.classes, names, thumbnails, text)


def _load(run: RunContent, config: ReportConfig, data: EvalDataConfig) -> FeatureImages:
    loaded = run.model
    size = data.image_size or loaded.backbone.config.img_size
    check_size(size, loaded.backbone.patch_size)
    transform = EvalTransform(size, data.crop_ratio, loaded.mean, loaded.std)
    dataset = build_feature_splits(data).with_range(data.range or loaded.value_range)
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


def _take(split: FeatureSplit, most: int) -> FeatureSplit:
    """Return at most `most` evenly spaced images of a split."""
    return split._replace(features=split.features.take(evenly_spaced(len(split.features.index), most)))


def _search(queries: Tensor, features: Tensor, k: int, own: Tensor | None) -> Neighbors:
    device = best_device()
    normalized = [F.normalize(part.to(device).float(), dim=1) for part in (queries, features)]
    exclude = None if own is None else own.to(device)
    found = exact_search(*normalized, k=k, exclude=exclude, engine=choose_engine("auto", device))
    return Neighbors(found.similarity.cpu(), found.indices.cpu())


def _failures(right: Tensor, found: Neighbors, taken: list[int]) -> list[int]:
    """Return rows with the fewest neighbors of their own class, those with the highest similarity first."""
    score = right.float().mean(dim=1) - 0.01 * found.similarity.mean(dim=1)
    order = score.argsort(stable=True).tolist()
    return [row for row in order if row not in taken and not right[row].all()][:FAILURES]


def _row(queries: FeatureSplit, index: FeatureSplit, found: Neighbors, row: int) -> list[NeighborImage]:
    """Return the query and its readable neighbors; nothing if the query cannot be read."""
    tiles: list[tuple[FeatureSplit, int, float | None]] = [(queries, row, None)]
    tiles += [
        (index, position, similarity)
        for position, similarity in zip(found.indices[row].tolist(), found.similarity[row].tolist(), strict=True)
    ]
    images: list[NeighborImage] = []
    for split, position, similarity in tiles:
        image_index, number = int(split.features.index[position]), int(split.features.labels[position])
        try:
            image = read_thumbnail(split.dataset, image_index, NEIGHBOR_SIDE)
        except UnreadableImageError:
            if similarity is None:
                return []
            continue
        label = split.dataset.classes[number] if number >= 0 else None
        unknown = similarity is None or label is None or images[0].label is None
        same_class = None if unknown else label == images[0].label
        images.append(NeighborImage(image, split.dataset.name(image_index), label, similarity, same_class))
    return images


def _pca(vectors: Tensor) -> tuple[Tensor, str]:
    """Compute the first two principal components (N, 2) of vectors (N, D), and their share of the variance.

    Their signs are those that make each component's third moment positive, so that they do not depend on the machine.
    """
    centered = (vectors - vectors.mean(dim=0)).double()
    left, values, _ = torch.linalg.svd(centered, full_matrices=False)  # (N, R), (R,)
    points = left[:, :2] * values[:2]
    points = points * torch.where((points**3).sum(dim=0) < 0, -1.0, 1.0)
    shares = values[:2] ** 2 / (values**2).sum()
    text = f"The two principal components, with {100 * shares[0]:.0f} % and {100 * shares[1]:.0f} % of the variance."
    return points.float(), text


def _tsne(vectors: Tensor, seed: int) -> tuple[Tensor, str]:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("projection=tsne needs scikit-learn: pip install 'ssl-vit[report]'") from None
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(vectors.numpy())
    text = f"t-SNE (perplexity {perplexity:.3g}, seed {seed}): who is near whom is kept, distances mean little."
    return torch.from_numpy(np.asarray(points, dtype=np.float32)), text
