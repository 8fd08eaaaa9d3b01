"""Rows of a picture and its nearest neighbours: some evenly chosen, and some that go wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.pictures import BrokenPicture, Pictures, evenly
from ssl_vit.errors import UserError
from ssl_vit.evaluation.export import Part
from ssl_vit.evaluation.search import Neighbours, choose_engine, nearest
from ssl_vit.evaluation.tiles import as_image, fitted
from ssl_vit.report.content import Near
from ssl_vit.report.sources import Known
from ssl_vit.training.hardware import best_device

ASKED = 500  # pictures among which rows are chosen
EVEN, WRONG = 8, 4  # rows
SEARCHED = 1 << 17  # pictures of the bank at most
SIDE = 96  # pixels of a tile


class Rows(NamedTuple):
    """Rows of neighbours, which they are, and how they were found."""

    rows: list[list[Near]]
    text: str
    how: str


def neighbour_rows(known: Known, k: int) -> Rows:
    """The k nearest to evenly spread pictures, then to those whose neighbours are most often of another class.

    Raises:
        UserError: There are too few pictures.
    """
    bank = known.bank.features.take(evenly(len(known.bank.features.index), SEARCHED))
    asked, own = known.asked, None
    if asked is None:
        own = evenly(len(bank.index), ASKED)
        queries = bank.take(own)
    else:
        queries = asked.features.take(evenly(len(asked.features.index), ASKED))
    k = min(k, len(bank.index) - (own is not None))
    if k < 1:
        raise UserError("One picture has no neighbours.")
    found = _search(queries.cls[:, -1], bank.cls[:, -1], k, own)
    right = (bank.labels[found.place] == queries.labels[:, None]) & (queries.labels[:, None] >= 0)  # (Q, k)
    labelled = bool(known.bank.pictures.classes)
    even = evenly(len(right), EVEN)
    chosen = [*even.tolist(), *(_wrong(right, found, even) if labelled else [])]
    query_part = Part("", (asked or known.bank).pictures, queries)
    bank_part = Part("", known.bank.pictures, bank)
    rows = [_row(query_part, bank_part, found, row) for row in chosen]
    text = f"The first {len(even)} rows are evenly spread over {len(right):,} pictures."
    if labelled:
        share, count = float(right[:, 0].float().mean()), len(chosen) - len(even)
        text += f" The last {count} are failures: those of them with the fewest neighbours of their own class."
        text += f" Of all {len(right):,}, {100 * share:.0f} % have their nearest neighbour in their own class."
    how = f"Cosine of the [CLS] of the last block; searched exactly among {len(bank.index):,} pictures: {known.text}"
    how += "" if own is None else " A picture is not its own neighbour."
    return Rows([row for row in rows if len(row) > 1], text, how)


def tile(pictures: Pictures, place: int, side: int) -> Tensor:
    """A picture (3, H, W) uint8 at least `side` pixels on its shorter side where it has as many; decoded no larger.

    Raises:
        BrokenPicture: It cannot be read.
    """
    return pictures.read(
        place, 3, lambda height, width: max(f for f in (1, 2, 4, 8) if f == 1 or min(height, width) >= f * side)
    )


def _search(queries: Tensor, bank: Tensor, k: int, own: Tensor | None) -> Neighbours:
    device = best_device()
    asking, known = (F.normalize(part.to(device).float(), dim=1) for part in (queries, bank))
    place = None if own is None else own.to(device)
    found = nearest(asking, known, k=k, own=place, engine=choose_engine("auto", device))
    return Neighbours(found.similarity.cpu(), found.place.cpu())


def _wrong(right: Tensor, found: Neighbours, taken: Tensor) -> list[int]:
    """Rows whose neighbours are fewest of their own class, the surest first; rows with all right are none."""
    score = right.float().mean(dim=1) - 0.01 * found.similarity.mean(dim=1)
    order = [row for row in score.argsort(stable=True).tolist() if row not in set(taken.tolist())]
    return [row for row in order if not right[row].all()][:WRONG]


def _row(queries: Part, bank: Part, found: Neighbours, row: int) -> list[Near]:
    """The query and those of its neighbours that can still be read; nothing where the query cannot."""
    tiles: list[tuple[Part, int, float | None]] = [(queries, row, None)]
    tiles += [
        (bank, place, similarity)
        for place, similarity in zip(found.place[row].tolist(), found.similarity[row].tolist(), strict=True)
    ]
    nears: list[Near] = []
    for part, place, similarity in tiles:
        try:
            picture = tile(part.pictures, int(part.features.index[place]), SIDE)
        except BrokenPicture:
            if similarity is None:
                return []
            continue
        label = int(part.features.labels[place])
        nears.append(
            Near(
                as_image(picture, fitted(picture, min(SIDE, max(picture.shape[-2:])))),
                part.pictures.name(int(part.features.index[place])),
                part.pictures.classes[label] if label >= 0 else None,
                similarity,
            )
        )
    return nears
