"""Attention statistics, rollout and CKA as textbooks write them: with loops, one number at a time."""

import math
from itertools import permutations

import torch


def unfused_attention(backbone, images):
    """The softmax matrices (B, heads, tokens, tokens) that timm itself forms in each block without fused attention."""
    seen = []
    handles = []
    for block in backbone.vit.blocks:
        block.attn.fused_attn = False
        catch = block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
        handles.append(catch)
    with torch.no_grad():
        backbone.vit.forward_features(images)
    for block, handle in zip(backbone.vit.blocks, handles, strict=True):
        block.attn.fused_attn = True
        handle.remove()
    return seen


def among_patches(matrix, prefix):
    """Rows and columns of the patches of one head's matrix, each row scaled to sum 1."""
    rows = []
    for query in range(prefix, len(matrix)):
        total = sum(float(matrix[query, key]) for key in range(prefix, len(matrix)))
        rows.append([float(matrix[query, key]) / total for key in range(prefix, len(matrix))])
    return rows


def distance(rows, columns, patch):
    """Mean attention distance in pixels of one head's patch-by-patch attention over a grid of so many columns."""
    total = 0.0
    for i, weights in enumerate(rows):
        for j, weight in enumerate(weights):
            down = (i // columns - j // columns) * patch
            across = (i % columns - j % columns) * patch
            total += weight * math.sqrt(down * down + across * across)
    return total / len(rows)


def entropy(rows):
    """Between 0 and 1."""
    total = 0.0
    for weights in rows:
        total -= sum(weight * math.log(weight) for weight in weights)
    return total / len(rows) / math.log(len(rows))


def cosine(one, other):
    pairs = [(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)]
    dot = sum(a * b for a, b in pairs)
    return dot / math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))


def rollout(matrices, prefix):
    """The class token's row over the patches, scaled to sum 1; `matrices` (heads, tokens, tokens) per block."""
    tokens = matrices[0].shape[-1]
    joint = torch.eye(tokens, dtype=torch.float64)
    for heads in matrices:
        step = torch.zeros(tokens, tokens, dtype=torch.float64)
        for i in range(tokens):
            for j in range(tokens):
                step[i, j] = 0.5 * sum(float(head[i, j]) for head in heads) / len(heads) + (0.5 if i == j else 0.0)
            step[i] /= step[i].sum()
        joint = step @ joint
    row = joint[0, prefix:]
    return row / row.sum()


def hsic(x, y):
    """The U-statistic: the mean over all ordered quadruples of different images."""
    k, m = x @ x.T, y @ y.T
    terms = [float(k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c])) for a, b, c, d in permutations(range(len(x)), 4)]
    return sum(terms) / len(terms)


def minibatch_cka(x, y, size):
    """Of the means over minibatches; what is left over counts by its images if these are four or more."""
    parts = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size) if len(x[i : i + size]) >= 4]
    xy = sum(len(a) * hsic(a, b) for a, b in parts)
    xx = sum(len(a) * hsic(a, a) for a, b in parts)
    yy = sum(len(a) * hsic(b, b) for a, b in parts)
    return xy / math.sqrt(xx * yy)
