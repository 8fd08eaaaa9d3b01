"""Slow textbook forms of the segmentation methods without labels: loops, numpy, float64."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import eigh


def rows_of_keys(keys: np.ndarray) -> list[np.ndarray]:
    """Return one long vector per patch from keys (heads, rows, columns, d)."""
    heads, rows, columns, _ = keys.shape
    return [np.concatenate([keys[h, r, c] for h in range(heads)]) for r in range(rows) for c in range(columns)]


def component(mask: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """Return the patches of the mask that are reached from one of them over sides of patches."""
    reached = np.zeros_like(mask)
    waiting = [start] if mask[start] else []
    while waiting:
        row, column = waiting.pop()
        if reached[row, column]:
            continue
        reached[row, column] = True
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < mask.shape[0] and 0 <= c < mask.shape[1] and mask[r, c]:
                waiting.append((r, c))
    return reached


def lost(keys: np.ndarray, k: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of similarities to the seed's set, and the mask."""
    vectors, grid = rows_of_keys(keys), keys.shape[1:3]
    n = len(vectors)
    degree = [sum(1 for q in range(n) if q != p and vectors[p] @ vectors[q] > 0) for p in range(n)]
    order = sorted(range(n), key=lambda p: (degree[p], p))
    seed = order[0]
    chosen = [p for p in order[:k] if vectors[p] @ vectors[seed] > 0]
    sums = np.array([sum(vectors[p] @ vectors[q] for q in chosen) for p in range(n)]).reshape(grid)
    return sums, component(sums > 0, divmod(seed, grid[1]))


def tokencut(keys: np.ndarray, tau: float = 0.2, weak: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """Return the second generalized eigenvector of (D - A, D), positive on the object's side, and the mask."""
    vectors, grid = [v / np.linalg.norm(v) for v in rows_of_keys(keys)], keys.shape[1:3]
    n = len(vectors)
    a = np.array([[1.0 if vectors[p] @ vectors[q] > tau else weak for q in range(n)] for p in range(n)])
    d = np.diag(a.sum(1))
    y = eigh(d - a, d)[1][:, 1]
    seed = int(np.argmax(np.abs(y)))
    if not y[seed] > y.mean():
        y = -y
    return y.reshape(grid), component((y > y.mean()).reshape(grid), divmod(seed, grid[1]))


def found(attention: np.ndarray, keys: np.ndarray, threshold: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines with the background's seed, and the mask of all other patches; for at least two heads."""
    heads, rows, columns = attention.shape
    mean = attention.mean()
    shares = []
    for h in range(heads):
        more = sum(1 for r in range(rows) for c in range(columns) if attention[h, r, c] > mean)
        shares.append(more / (rows * columns) + 1e-10)
    weights = [math.log(sum(shares) / share) for share in shares]
    places = [(r, c) for r in range(rows) for c in range(columns)]
    seed = min(places, key=lambda p: sum(w * attention[h][p] for h, w in enumerate(weights)))
    vectors = {p: np.concatenate([w * keys[h][p] for h, w in enumerate(weights)]) for p in places}
    cosines = np.zeros((rows, columns))
    for p in places:
        cosines[p] = vectors[p] @ vectors[seed] / np.linalg.norm(vectors[p]) / np.linalg.norm(vectors[seed])
    return cosines, cosines <= threshold


def principal_components(dataset: list[np.ndarray], count: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean, unit components that point away from the borders' mean, and deviations along them."""
    tokens = np.array([token for image in dataset for row in image for token in row])
    border = [
        image[r, c]
        for image in dataset
        for r, c in np.ndindex(image.shape[:2])
        if r in (0, image.shape[0] - 1) or c in (0, image.shape[1] - 1)
    ]
    mean = tokens.mean(0)
    _, _, components = np.linalg.svd(tokens - mean, full_matrices=False)
    components = components[:count]
    for component_ in components:
        if np.mean([(token - mean) @ component_ for token in border]) > 0:
            component_ *= -1
    return mean, components, ((tokens - mean) @ components.T).std(0)
