"""Rows of an image and its nearest neighbors: evenly spaced ones, and failures."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.dataset import UnreadableImageError, evenly_spaced
from ssl_vit.evaluation.classification.nearest_neighbors import Neighbors, choose_engine, exact_search
from ssl_vit.evaluation.features.feature_export import FeatureSplit
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.report.feature_images import FeatureImages, read_thumbnail
from ssl_vit.visualization.report.report_data import NeighborImage

MAX_QUERIES = 500  # images among which rows are chosen
EVEN, FAILURES = 8, 4  # rows
MAX_INDEX = 1 << 17  # images that are searched
SIDE = 96  # pixels of a tile


class NeighborRows(NamedTuple):
    """Rows of neighbors, which they are, and how they were found."""

    rows: list[list[NeighborImage]]
    text: str
    protocol: str


def neighbor_rows(images: FeatureImages, k: int) -> NeighborRows:
    """Find the k nearest images of evenly spaced ones, then of those whose neighbors are most often of another class.

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
    return NeighborRows([row for row in rows if len(row) > 1], text, protocol)


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
            image = read_thumbnail(split.dataset, image_index, SIDE)
        except UnreadableImageError:
            if similarity is None:
                return []
            continue
        label = split.dataset.classes[number] if number >= 0 else None
        unknown = similarity is None or label is None or images[0].label is None
        same_class = None if unknown else label == images[0].label
        images.append(NeighborImage(image, split.dataset.name(image_index), label, similarity, same_class))
    return images
