"""Slow textbook forms of the losses: loops, numpy, float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dino(student, teacher, center, student_temperature, teacher_temperature) -> float:
    """Pair by pair, image by image: student (V, B, K) and teacher (G, B, K) logits."""
    total, terms = 0.0, 0
    for g in range(len(teacher)):
        q = softmax((teacher[g] - center) / teacher_temperature)
        for v in range(len(student)):
            if v == g:
                continue
            p = softmax(student[v] / student_temperature)
            total += np.mean([-np.sum(q[b] * np.log(p[b])) for b in range(q.shape[0])])
            terms += 1
    return total / terms


def dino_dense(student: Tensor, teacher: Tensor, center: Tensor, student_temperature, teacher_temperature) -> Tensor:
    """The same with all logits at hand, for its gradient."""
    q = torch.softmax((teacher - center) / teacher_temperature, dim=-1)
    log_p = torch.log_softmax(student / student_temperature, dim=-1)
    pairs = [(g, v) for g in range(len(teacher)) for v in range(len(student)) if v != g]
    return torch.stack([-(q[g] * log_p[v]).sum(-1).mean() for g, v in pairs]).mean()


def nt_xent(first, second, temperature) -> float:
    """Anchor by anchor over the 2B embeddings."""
    z = np.concatenate([first, second])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    n, b = len(z), len(first)
    losses = []
    for i in range(n):
        positive = (i + b) % n
        others = [np.exp(z[i] @ z[k] / temperature) for k in range(n) if k != i]
        losses.append(-np.log(np.exp(z[i] @ z[positive] / temperature) / np.sum(others)))
    return float(np.mean(losses))


def alignment(one, other) -> float:
    """Image by image, (B, D) of two views."""
    unit = [[row / np.linalg.norm(row) for row in view] for view in (one, other)]
    return float(np.mean([np.sum((a - b) ** 2) for a, b in zip(*unit, strict=True)]))


def uniformity(features) -> float:
    """Pair by pair of (B, D)."""
    unit = [row / np.linalg.norm(row) for row in features]
    kernel = [np.exp(-2 * np.sum((a - b) ** 2)) for i, a in enumerate(unit) for b in unit[:i]]
    return float(np.log(np.mean(kernel)))


def l1(reconstruction, clean, corrupted=None) -> float:
    """Pixel by pixel, (B, C, H, W) with the mask (B, 1, H, W)."""
    total, count = 0.0, 0
    for index in np.ndindex(clean.shape):
        b, _, h, w = index
        if corrupted is None or corrupted[b, 0, h, w]:
            total += abs(reconstruction[index] - clean[index])
            count += 1
    return total / max(count, 1)
