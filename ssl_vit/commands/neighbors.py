"""`ssl-vit neighbors`: find the images with the most similar features, draw and list them.

ssl-vit neighbors checkpoint=runs/photos data.root=photos images=photo.jpg
ssl-vit neighbors checkpoint=runs/photos data.root=photos index=ivf out=figures/nearest.png
ssl-vit neighbors checkpoint=timm:vit_small_patch16_224.dino eval_data=cifar10 data.root=data limit=20
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.config.evaluate import NeighborsConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset
from ssl_vit.data.dataset_factory import TrainTestSplit, build_feature_splits
from ssl_vit.data.sources.image_folder import ImageFolder, load_images_at
from ssl_vit.data.value_notes import value_notes
from ssl_vit.evaluation.classification.ann_index import IVFIndex, StaleIndexError
from ssl_vit.evaluation.classification.nearest_neighbors import Neighbors, choose_engine, exact_search
from ssl_vit.evaluation.evaluator import BLOCKS, fill_caches, load_model
from ssl_vit.evaluation.features.extractor import (
    BackboneExtractor,
    Features,
    extract,
    on_best_device,
    validate_features,
)
from ssl_vit.evaluation.results.provenance import data_inputs
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.runtime.text import pluralize
from ssl_vit.visualization.image_rows import NeighborTile, neighbor_figure

MAX_ROWS = 100  # of the figure; the JSON has all queries


class FeatureSet(NamedTuple):
    """A dataset with the features of its readable images."""

    dataset: ImageDataset
    features: Features
    skipped: SkippedImageLog
    folder: Path  # of the feature cache

    def class_of(self, row: int) -> str | None:
        """Return the name of an image's class, if it is known."""
        label = int(self.features.labels[row])
        return self.dataset.classes[label] if label >= 0 else None

    def name(self, row: int) -> str:
        """Return the name of an image in its dataset."""
        return self.dataset.name(int(self.features.index[row]))

    def read(self, row: int) -> Tensor:
        """Read an image (3, H, W) uint8."""
        return self.dataset.read(int(self.features.index[row]), 3)


def main(config: NeighborsConfig) -> None:
    """Search, draw the figure, and write the JSON beside it.

    Raises:
        UserError: Model or images are missing, do not fit each other, or there is only one image.
    """
    given = None if config.images is None else load_images_at(config.images)
    loaded, transform = load_model(config)
    outputs = [config.out, config.out.with_suffix(".json")]
    check_outputs(outputs, "neighbors", inputs={"images": config.images, **data_inputs(config.data)})
    record_outputs(outputs, "neighbors")
    value_range = config.data.range or loaded.value_range
    dataset = build_feature_splits(config.data).train.with_range(value_range)
    given = given and given.with_range(value_range)
    extractor = BackboneExtractor(on_best_device(loaded), transform, blocks=min(BLOCKS, loaded.backbone.num_blocks))
    (filled,) = fill_caches(extractor, TrainTestSplit(dataset, None), config=config, run=loaded.run)
    cache = filled.cache
    index_set = FeatureSet(dataset, cache.features(blocks=1), cache.skipped, cache.folder)
    validate_features(index_set.features, loaded.source)
    queries, exclude = _queries(config, given, extractor, index_set)
    k = min(config.k, len(index_set.features.index) - (exclude is not None))
    if not k:
        raise UserError("only one image can be read, so it has no neighbors")
    found, method = _search(config, index_set, queries.features, exclude, k)
    rows = _to_rows(index_set, queries, found)
    skipped = {"images": index_set.skipped.count(), "queries": 0 if exclude is not None else queries.skipped.count()}
    content = {
        "model": {"source": loaded.source, "sha256": loaded.sha256},
        "dataset": index_set.dataset.describe(),
        "images": None if config.images is None else str(config.images),
        "notes": (notes := value_notes(index_set.dataset)),
        "search": method,
        "skipped": skipped,
        "queries": rows,
    }
    write_json(config.out.with_suffix(".json"), content)
    with atomic_write(config.out) as file:
        figure = neighbor_figure(_to_tiles(index_set, queries, found))
        figure.save(file, format="PNG" if config.out.suffix == ".png" else "JPEG", quality=90)
    counts = {part.skipped.path: part.skipped.count() for part in (index_set, queries)}
    print("\n".join([*notes, _summary(config, rows, method, counts)]))


def _queries(
    config: NeighborsConfig, given: ImageFolder | None, extractor: BackboneExtractor, index_set: FeatureSet
) -> tuple[FeatureSet, Tensor | None]:
    """Return the queries; if they are drawn from the index set, also their rows (Q,) in it."""
    if given is None:
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randperm(len(index_set.features.index), generator=generator)[: config.limit].sort().values
        return index_set._replace(features=index_set.features.take(rows)), rows
    first = Subset(given, torch.arange(min(config.limit, len(given))))
    skipped = SkippedImageLog(config.out.with_name(f"{config.out.stem}-skipped_images.txt"))
    skipped.path.unlink(missing_ok=True)
    size, num_workers = config.data.batch_size, config.data.num_workers
    features = extract(extractor, first, batch_size=size, num_workers=num_workers, skipped=skipped)
    return FeatureSet(first, features, skipped, config.out.parent), None


def _search(
    config: NeighborsConfig, index_set: FeatureSet, queries: Features, exclude: Tensor | None, k: int
) -> tuple[Neighbors, dict[str, Any]]:
    """Find the k nearest images of each query, and describe the method."""
    features, vectors = index_set.features.cls[:, -1], queries.cls[:, -1]  # (N, D), (Q, D)
    if config.index == "ivf":
        index = _load_or_build_index(config, index_set.folder, features, k)
        description = {"index": "ivf", **index.quality._asdict(), "measured_on": "images of the index, leave-one-out"}
        return index.search(vectors, k=k, exclude=exclude), description
    device = best_device()
    features, vectors = (F.normalize(part.to(device).float(), dim=1) for part in (features, vectors))
    excluded = None if exclude is None else exclude.to(device)
    found = exact_search(vectors, features, k=k, exclude=excluded, engine=choose_engine("auto", device))
    return Neighbors(found.similarity.cpu(), found.indices.cpu()), {"index": "exact", "k": k}


def _load_or_build_index(config: NeighborsConfig, folder: Path, features: Tensor, k: int) -> IVFIndex:
    """Return the index of the features, from its file if there is one for this k and recall."""
    path = folder / f"nearest-{k}-{config.recall:g}.ivf"
    if path.exists():
        try:
            return IVFIndex.load(path, features)
        except StaleIndexError as reason:
            print(f"{reason}; building it again")
    index = IVFIndex.build(features, k=k, recall=config.recall, seed=config.seed)
    index.save(path)
    return index


def _to_rows(index_set: FeatureSet, queries: FeatureSet, found: Neighbors) -> list[dict[str, Any]]:
    """Return each query with its neighbors, as plain containers."""
    return [
        {
            "name": queries.name(row),
            "class": queries.class_of(row),
            "neighbors": [
                {"name": index_set.name(index), "class": index_set.class_of(index), "cosine": round(cosine, 6)}
                for index, cosine in zip(indices, cosines, strict=True)
            ],
        }
        for row, (indices, cosines) in enumerate(zip(found.indices.tolist(), found.similarity.tolist(), strict=True))
    ]


def _to_tiles(index_set: FeatureSet, queries: FeatureSet, found: Neighbors) -> list[list[NeighborTile]]:
    """Return the rows of the figure, with their images."""
    rows = []
    first = zip(found.indices[:MAX_ROWS].tolist(), found.similarity[:MAX_ROWS].tolist(), strict=True)
    for row, (indices, cosines) in enumerate(first):
        name = queries.class_of(row)
        target = name if name in index_set.dataset.classes else None
        tiles = [NeighborTile(queries.read(row), [queries.name(row), name or ""], None)]
        for index, cosine in zip(indices, cosines, strict=True):
            label = index_set.class_of(index)
            lines = [f"{cosine:.3f}", label or index_set.name(index)]
            tiles.append(NeighborTile(index_set.read(index), lines, label == target if label and target else None))
        rows.append(tiles)
    return rows


def _summary(
    config: NeighborsConfig, rows: list[dict[str, Any]], method: dict[str, Any], skipped: dict[Path, int]
) -> str:
    """Return what was found and where it was written."""
    k = len(rows[0]["neighbors"])
    lines = [f"{k} neighbors of {pluralize(len(rows), 'image')}: {config.out}, {config.out.with_suffix('.json')}"]
    if len(rows) > MAX_ROWS:
        lines.append(f"the figure shows the first {MAX_ROWS} queries")
    if k < config.k:
        lines.append(f"k={config.k}: there are only {k} other images")
    if method["index"] == "ivf":
        lines.append(
            f"{method['recall']:.1%} of the true neighbors found in {method['probes']:,} of {method['lists']:,} lists; "
            f"{method['query_ms']:.2f} ms per query, built in {method['build_seconds']:.1f} s"
        )
    lines += [f"{pluralize(count, 'image')} could not be read: {path}" for path, count in skipped.items() if count]
    return "\n".join(lines)
