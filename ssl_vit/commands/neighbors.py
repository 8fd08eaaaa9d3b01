"""`ssl-vit neighbors`: the images whose features are nearest to those of an image, drawn and listed.

ssl-vit neighbors checkpoint=runs/photos data.root=photos images=photo.jpg
ssl-vit neighbors checkpoint=runs/photos data.root=photos index=ivf out=sheets/nearest.png
ssl-vit neighbors checkpoint=timm:vit_small_patch16_224.dino labeled=cifar10 data.root=data limit=20
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
from ssl_vit.data.sources.image_folder import load_images_at
from ssl_vit.data.transforms.eval_transform import EvalTransform
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
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.neighbor_figure import NeighborTile, neighbor_figure

DRAWN = 100  # rows of a sheet; the JSON has all queries


class FeatureSet(NamedTuple):
    """Images and the features of those that can be read."""

    dataset: ImageDataset
    features: Features
    skipped: SkippedImageLog
    folder: Path  # of what is kept about them

    def class_of(self, row: int) -> str | None:
        """The name of an image's class, where it is known."""
        label = int(self.features.labels[row])
        return self.dataset.classes[label] if label >= 0 else None

    def name(self, row: int) -> str:
        """As the dataset names it."""
        return self.dataset.name(int(self.features.index[row]))

    def read(self, row: int) -> Tensor:
        """The image (3, H, W) uint8."""
        return self.dataset.read(int(self.features.index[row]), 3)


def main(config: NeighborsConfig) -> None:
    """Search, draw the sheet, and write the JSON beside it.

    Raises:
        UserError: Model or images are not there, do not fit, or leave nothing to search for.
    """
    loaded, transform = load_model(config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    known = _known(config, on_best_device(loaded), transform)
    validate_features(known.features, loaded.source)
    asked, own = _queries(config, loaded, transform, known)
    k = min(config.k, len(known.features.index) - (own is not None))
    if not k:
        raise UserError("only one image can be read: it has no neighbors")
    found, how = _search(config, known, asked.features, own, k)
    rows = _listed(known, asked, found)
    skipped = {"images": known.skipped.count(), "queries": 0 if own is not None else asked.skipped.count()}
    content = {
        "model": {"source": loaded.source, "sha256": loaded.sha256},
        "dataset": known.dataset.describe(),
        "images": None if config.images is None else str(config.images),
        "search": how,
        "skipped": skipped,
        "queries": rows,
    }
    write_json(config.out.with_suffix(".json"), content)
    with atomic_write(config.out) as file:
        sheet = neighbor_figure(_tiles(known, asked, found))
        sheet.save(file, format="PNG" if config.out.suffix == ".png" else "JPEG", quality=90)
    print(_report(config, rows, how, {part.skipped.path: part.skipped.count() for part in (known, asked)}))


def _known(config: NeighborsConfig, loaded: LoadedBackbone, transform: EvalTransform) -> FeatureSet:
    """The images to search among, and their features, stored now or before."""
    dataset = build_feature_splits(config.data).train
    describe = BackboneExtractor(loaded, transform, blocks=min(BLOCKS, loaded.backbone.num_blocks))
    (found,) = fill_caches(describe, TrainTestSplit(dataset, None), config=config, run=loaded.run)
    return FeatureSet(dataset, found.cache.features(blocks=1), found.cache.skipped, found.cache.folder)


def _queries(
    config: NeighborsConfig, loaded: LoadedBackbone, transform: EvalTransform, known: FeatureSet
) -> tuple[FeatureSet, Tensor | None]:
    """What to search for; where that is some of the known images, their rows (Q,) too."""
    if config.images is None:
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randperm(len(known.features.index), generator=generator)[: config.limit].sort().values
        return known._replace(features=known.features.take(rows)), rows
    given = load_images_at(config.images)
    first = Subset(given, torch.arange(min(config.limit, len(given))))
    skipped = SkippedImageLog(config.out.with_name(f"{config.out.stem}-skipped_images.txt"))
    skipped.path.unlink(missing_ok=True)
    features = extract(
        loaded,
        first,
        transform,
        blocks=1,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        skipped=skipped,
    )
    return FeatureSet(first, features, skipped, config.out.parent), None


def _search(
    config: NeighborsConfig, known: FeatureSet, asked: Features, own: Tensor | None, k: int
) -> tuple[Neighbors, dict[str, Any]]:
    """The k nearest known images to each that is asked for, and how they were searched for."""
    bank, queries = known.features.cls[:, -1], asked.cls[:, -1]  # (N, D), (Q, D)
    if config.index == "ivf":
        index = _index(config, known.folder, bank, k)
        return index.search(queries, k=k, exclude=own), {
            "index": "ivf",
            **index.quality._asdict(),
            "measured_on": "images of the set itself, each by the others",
        }
    device = best_device()
    bank, queries = (F.normalize(part.to(device).float(), dim=1) for part in (bank, queries))
    place = None if own is None else own.to(device)
    found = exact_search(queries, bank, k=k, exclude=place, engine=choose_engine("auto", device))
    return Neighbors(found.similarity.cpu(), found.indices.cpu()), {"index": "exact", "k": k}


def _index(config: NeighborsConfig, folder: Path, features: Tensor, k: int) -> IVFIndex:
    """The index beside the features, built where there is none for this k and recall."""
    path = folder / f"nearest-{k}-{config.recall:g}.ivf"
    if path.exists():
        try:
            index = IVFIndex.load(path, features)
        except StaleIndexError as reason:
            print(f"{reason}; it is built anew")
        else:
            return index
    index = IVFIndex.build(features, k=k, recall=config.recall, seed=config.seed)
    index.save(path)
    return index


def _listed(known: FeatureSet, asked: FeatureSet, found: Neighbors) -> list[dict[str, Any]]:
    """Each query with its neighbors, as plain containers."""
    return [
        {
            "name": asked.name(row),
            "class": asked.class_of(row),
            "neighbors": [
                {"name": known.name(place), "class": known.class_of(place), "cosine": round(cosine, 6)}
                for place, cosine in zip(places, cosines, strict=True)
            ],
        }
        for row, (places, cosines) in enumerate(zip(found.indices.tolist(), found.similarity.tolist(), strict=True))
    ]


def _tiles(known: FeatureSet, asked: FeatureSet, found: Neighbors) -> list[list[NeighborTile]]:
    """The rows of the sheet, their images read again."""
    rows = []
    for row, (places, cosines) in enumerate(
        zip(found.indices[:DRAWN].tolist(), found.similarity[:DRAWN].tolist(), strict=True)
    ):
        wanted = asked.class_of(row) if asked.class_of(row) in known.dataset.classes else None
        tiles = [NeighborTile(asked.read(row), [asked.name(row), asked.class_of(row) or ""], None)]
        for place, cosine in zip(places, cosines, strict=True):
            named = known.class_of(place)
            lines = [f"{cosine:.3f}", named or known.name(place)]
            tiles.append(NeighborTile(known.read(place), lines, named == wanted if named and wanted else None))
        rows.append(tiles)
    return rows


def _report(config: NeighborsConfig, rows: list[dict[str, Any]], how: dict[str, Any], skipped: dict[Path, int]) -> str:
    """What was done and where it lies."""
    k = len(rows[0]["neighbors"])
    lines = [f"The {k} nearest to each of {len(rows):,} images: {config.out}, {config.out.with_suffix('.json')}"]
    if len(rows) > DRAWN:
        lines.append(f"the first {DRAWN} are drawn")
    if k < config.k:
        lines.append(f"k={config.k}: there are only {k} others")
    if how["index"] == "ivf":
        lines.append(
            f"{how['recall']:.1%} of the true neighbors found, in {how['probes']:,} of {how['lists']:,} lists; "
            f"{how['query_ms']:.2f} ms a query, built in {how['build_seconds']:.1f} s"
        )
    lines += [f"{count:,} could not be read: {path}" for path, count in skipped.items() if count]
    return "\n".join(lines)
