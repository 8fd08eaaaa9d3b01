"""Rows of an image and its nearest neighbors: evenly spaced ones, and failures."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, UnreadableImageError, evenly_spaced
from ssl_vit.evaluation.classification.nearest_neighbors import Neighbors, choose_engine, exact_search
from ssl_vit.evaluation.features.feature_export import FeatureSplit
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.image_grid import fit_size, to_pil
from ssl_vit.visualization.report.image_sources import FeatureImages
from ssl_vit.visualization.report.schema import Near

ASKED = 500  # images among which rows are chosen
EVEN, WRONG = 8, 4  # rows
SEARCHED = 1 << 17  # images of the bank at most
SIDE = 96  # pixels of a tile


class Rows(NamedTuple):
    """Rows of neighbors, which they are, and how they were found."""

    rows: list[list[Near]]
    text: str
    how: str


def neighbor_rows(known: FeatureImages, k: int) -> Rows:
    """Find the k nearest images of evenly spaced ones, then of those whose neighbors are most often of another class.

    Raises:
        UserError: There are too few images.
    """
    bank = known.bank.features.take(evenly_spaced(len(known.bank.features.index), SEARCHED))
    asked, own = known.asked, None
    if asked is None:
        own = evenly_spaced(len(bank.index), ASKED)
        queries = bank.take(own)
    else:
        queries = asked.features.take(evenly_spaced(len(asked.features.index), ASKED))
    k = min(k, len(bank.index) - (own is not None))
    if k < 1:
        raise UserError("One image has no neighbors.")
    found = _search(queries.cls[:, -1], bank.cls[:, -1], k, own)
    right = (bank.labels[found.indices] == queries.labels[:, None]) & (queries.labels[:, None] >= 0)  # (Q, k)
    labeled = bool(known.bank.dataset.classes)
    even = evenly_spaced(len(right), EVEN)
    chosen = [*even.tolist(), *(_wrong(right, found, even) if labeled else [])]
    query_part = FeatureSplit("", (asked or known.bank).dataset, queries)
    bank_part = FeatureSplit("", known.bank.dataset, bank)
    rows = [_row(query_part, bank_part, found, row) for row in chosen]
    text = f"The first {len(even)} rows are evenly spread over {len(right):,} images."
    if labeled:
        share, count = float(right[:, 0].float().mean()), len(chosen) - len(even)
        text += f" The last {count} are failures: those of them with the fewest neighbors of their own class."
        text += f" Of all {len(right):,}, {100 * share:.0f} % have their nearest neighbor in their own class."
    how = f"Cosine of the [CLS] of the last block; searched exactly among {len(bank.index):,} images: {known.text}"
    how += "" if own is None else " An image is not its own neighbor."
    return Rows([row for row in rows if len(row) > 1], text, how)


def tile(dataset: ImageDataset, place: int, side: int) -> Tensor:
    """Read an image (3, H, W) uint8, decoded as small as its shorter side still has `side` pixels.

    Raises:
        UnreadableImageError: It cannot be read.
    """
    return dataset.read(
        place, 3, lambda height, width: max(f for f in (1, 2, 4, 8) if f == 1 or min(height, width) >= f * side)
    )


def _search(queries: Tensor, bank: Tensor, k: int, own: Tensor | None) -> Neighbors:
    device = best_device()
    asking, known = (F.normalize(part.to(device).float(), dim=1) for part in (queries, bank))
    place = None if own is None else own.to(device)
    found = exact_search(asking, known, k=k, exclude=place, engine=choose_engine("auto", device))
    return Neighbors(found.similarity.cpu(), found.indices.cpu())


def _wrong(right: Tensor, found: Neighbors, taken: Tensor) -> list[int]:
    """Rows whose neighbors are fewest of their own class, the surest first; rows with all right are none."""
    score = right.float().mean(dim=1) - 0.01 * found.similarity.mean(dim=1)
    order = [row for row in score.argsort(stable=True).tolist() if row not in set(taken.tolist())]
    return [row for row in order if not right[row].all()][:WRONG]


def _row(queries: FeatureSplit, bank: FeatureSplit, found: Neighbors, row: int) -> list[Near]:
    """Return the query and its readable neighbors; nothing if the query cannot be read."""
    tiles: list[tuple[FeatureSplit, int, float | None]] = [(queries, row, None)]
    tiles += [
        (bank, place, similarity)
        for place, similarity in zip(found.indices[row].tolist(), found.similarity[row].tolist(), strict=True)
    ]
    nears: list[Near] = []
    for part, place, similarity in tiles:
        try:
            image = tile(part.dataset, int(part.features.index[place]), SIDE)
        except UnreadableImageError:
            if similarity is None:
                return []
            continue
        label = int(part.features.labels[place])
        nears.append(
            Near(
                to_pil(image, fit_size(image, min(SIDE, max(image.shape[-2:])))),
                part.dataset.name(int(part.features.index[place])),
                part.dataset.classes[label] if label >= 0 else None,
                similarity,
            )
        )
    return nears
