"""Slow textbook forms of the metrics of segmentation: pixel by pixel, threshold by threshold, with plain numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def slow_f(predicted: np.ndarray, target: np.ndarray, beta_squared: float) -> float:
    """Compute F from precision and recall of flat arrays of bool; 0 where neither is above 0."""
    hits = float((predicted & target).sum())
    if hits == 0:
        return 0.0
    precision, recall = hits / predicted.sum(), hits / target.sum()
    return (1 + beta_squared) * precision * recall / (beta_squared * precision + recall)


def slow_f_curve(scaled: np.ndarray, target: np.ndarray, beta_squared: float) -> list[float]:
    """Compute F of values in 0..1 above each of 0, 1/255, ..., 254/255."""
    return [slow_f(scaled > k / 255, target, beta_squared) for k in range(255)]


def slow_max_f_dataset(dataset: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Compute TokenCut's maxF: F averaged over images at each threshold, then the largest."""
    curves = [slow_f_curve(scaled, target, 0.3) for scaled, target in dataset]
    return max(sum(at_one) / len(at_one) for at_one in zip(*curves, strict=True))


def slow_max_f_selfmask(dataset: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Compute SelfMask's maxF: each image's largest F, then averaged; 0.3 is squared once more."""
    best = [max(slow_f_curve(scaled, target, 0.3**2)) for scaled, target in dataset]
    return sum(best) / len(best)


def slow_components(mask: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    """Yield the pixels (row, column) of each part of a mask that is connected by sides of pixels."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    while left:
        part, border = [], [left.pop()]
        while border:
            row, column = border.pop()
            part.append((row, column))
            near = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)} & left
            left -= near
            border.extend(near)
        yield part


def slow_box(part: list[tuple[int, int]]) -> list[int]:
    """Return left, top, right and bottom; the last two exclusive."""
    rows, columns = zip(*part, strict=True)
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
