"""Slow textbook forms of the measures of segmentation: pixel by pixel, threshold by threshold, with plain numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def slow_f(predicted: np.ndarray, truth: np.ndarray, beta_squared: float) -> float:
    """F from precision and recall of flat arrays of bool; 0 where neither is above 0."""
    hits = float((predicted & truth).sum())
    if hits == 0:
        return 0.0
    precision, recall = hits / predicted.sum(), hits / truth.sum()
    return (1 + beta_squared) * precision * recall / (beta_squared * precision + recall)


def slow_f_curve(scaled: np.ndarray, truth: np.ndarray, beta_squared: float) -> list[float]:
    """F of values in 0..1 above each of 0, 1/255, ..., 254/255."""
    return [slow_f(scaled > k / 255, truth, beta_squared) for k in range(255)]


def slow_max_f_dataset(dataset: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """TokenCut's: F averaged over images at each threshold, then the largest."""
    curves = [slow_f_curve(scaled, truth, 0.3) for scaled, truth in dataset]
    return max(sum(at_one) / len(at_one) for at_one in zip(*curves, strict=True))


def slow_max_f_selfmask(dataset: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """SelfMask's: each image's largest F, then averaged; 0.3 is squared once more."""
    best = [max(slow_f_curve(scaled, truth, 0.3**2)) for scaled, truth in dataset]
    return sum(best) / len(best)


def slow_components(mask: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    """The pixels (row, column) of each part of a mask whose pixels touch by their sides."""
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
    """Left, top, right, bottom; the last two outside."""
    rows, columns = zip(*part, strict=True)
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


def slow_box_iou(one: list[int], other: list[int]) -> float:
    """By the pixels within each box."""
    first, second = (
        {(x, y) for x in range(left, right) for y in range(top, bottom)} for left, top, right, bottom in (one, other)
    )
    return len(first & second) / len(first | second)
