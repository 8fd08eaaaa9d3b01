"""Slow textbook forms of label propagation and of DAVIS's J and F, patch by patch and pixel by pixel."""

import math

import numpy as np


def propagate(features, sources, *, radius, top_k, temperature):
    """Return labels (rows, columns, classes) from sources, pairs of features (rows, columns, D) and labels."""
    rows, columns, _ = features.shape
    propagated = np.zeros(sources[0][1].shape)
    for row in range(rows):
        for column in range(columns):
            found = [  # similarity and label of each patch within the radius
                (float(features[row, column] @ source[r, c]), labels[r, c])
                for source, labels in sources
                for r in range(rows)
                for c in range(columns)
                if radius is None or max(abs(r - row), abs(c - column)) <= radius
            ]
            least = sorted((similar for similar, _ in found), reverse=True)[:top_k][-1]
            chosen = [(math.exp(similar / temperature), label) for similar, label in found if similar >= least]
            total = sum(weight for weight, _ in chosen)
            propagated[row, column] = sum(weight / total * label for weight, label in chosen)
    return propagated


def boundary(mask):
    """Return the pixels whose right, lower or lower right neighbor differs."""
    height, width = mask.shape
    edge = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1)):
                other = mask[min(y + dy, height - 1), min(x + dx, width - 1)]
                edge[y, x] |= mask[y, x] != other
    return edge


def boundary_f(mask, target):
    height, width = mask.shape
    radius = math.ceil(0.008 * math.sqrt(height**2 + width**2))
    points, target_points = np.argwhere(boundary(mask)), np.argwhere(boundary(target))
    if len(points) == 0 and len(target_points) == 0:
        return 1.0
    if len(points) == 0 or len(target_points) == 0:
        return 0.0
    precision = np.mean([any(((p - t) ** 2).sum() <= radius**2 for t in target_points) for p in points])
    recall = np.mean([any(((p - t) ** 2).sum() <= radius**2 for p in points) for t in target_points])
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def region(mask, target):
    either = sum(m or t for m, t in zip(mask.flat, target.flat, strict=True))
    both = sum(m and t for m, t in zip(mask.flat, target.flat, strict=True))
    return both / either if either else 1.0


def decay(values):
    """Compute the decay as the DAVIS evaluation does: quarters between rounded indices, both ends included."""
    ids = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    return values[ids[0] : ids[1] + 1].mean() - values[ids[3] : ids[4] + 1].mean()
