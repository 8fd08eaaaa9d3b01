"""Attention statistics, rollout and CKA with loops, one number at a time."""

import math
from itertools import permutations

import torch


def unfused_attention(backbone, images):
    """Return the softmax matrices (B, heads, tokens, tokens) that timm computes per block without fused attention."""
    matrices = []
    handles = []
    for block in backbone.vit.blocks:
        block.attn.fused_attn = False
        hook = block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: matrices.append(inputs[0]))
        handles.append(hook)
    with torch.no_grad():
        backbone.vit.forward_features(images)
    for block, handle in zip(backbone.vit.blocks, handles, strict=True):
        block.attn.fused_attn = True
        handle.remove()
    return matrices


def patch_attention(matrix, prefix):
    """Return the rows and columns of the patches of the matrix of one head, each row scaled to sum 1."""
    rows = []
    for query in range(prefix, len(matrix)):
        total = sum(float(matrix[query, key]) for key in range(prefix, len(matrix)))
        rows.append([float(matrix[query, key]) / total for key in range(prefix, len(matrix))])
    return rows


def distance(rows, columns, patch):
    """Return the mean attention distance in pixels of the patch attention of one head on a grid of `columns`."""
    total = 0.0
    for i, weights in enumerate(rows):
        for j, weight in enumerate(weights):
            down = (i // columns - j // columns) * patch
            across = (i % columns - j % columns) * patch
            total += weight * math.sqrt(down * down + across * across)
    return total / len(rows)


def entropy(rows):
    """Return the mean entropy of the rows over its maximum, between 0 and 1."""
    total = 0.0
    for weights in rows:
        total -= sum(weight * math.log(weight) for weight in weights)
    return total / len(rows) / math.log(len(rows))


def cosine(one, other):
    """Return the cosine similarity of two matrices, given as lists of rows."""
    pairs = [(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)]
    dot = sum(a * b for a, b in pairs)
    return dot / math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))


def rollout(matrices, prefix):
    """Return the rollout of the class token over the patches, scaled to sum 1.

    `matrices` has (heads, tokens, tokens) per block.
    """
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
    """Return the U-statistic: the mean over all ordered quadruples of different images."""
    k, m = x @ x.T, y @ y.T
    terms = [float(k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c])) for a, b, c, d in permutations(range(len(x)), 4)]
    return sum(terms) / len(terms)


def minibatch_cka(x, y, size):
    """Return the CKA from means over minibatches; a last incomplete one counts by its images if at least four."""
    parts = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size) if len(x[i : i + size]) >= 4]
    xy = sum(len(a) * hsic(a, b) for a, b in parts)
    xx = sum(len(a) * hsic(a, a) for a, b in parts)
    yy = sum(len(b) * hsic(b, b) for a, b in parts)
    return xy / math.sqrt(xx * yy)
