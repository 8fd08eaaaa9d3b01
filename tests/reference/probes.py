"""Slow textbook forms of the probes on frozen features: loops, float64."""

from __future__ import annotations

import numpy as np
import torch


def nearest(queries, bank, k, *, leave_one_out=False) -> list[list[int]]:
    """Of each query the k rows of largest cosine; of equal ones the first."""
    queries, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank))
    lists = []
    for q, query in enumerate(queries):
        similarity = [float(np.dot(query, row)) for row in bank]
        others = [i for i in range(len(bank)) if not (leave_one_out and i == q)]
        lists.append(sorted(others, key=lambda i: (-similarity[i], i))[:k])
    return lists


def knn_classes(queries, bank, labels, k, temperature, *, leave_one_out=False) -> list[list[int]]:
    """Of each query the classes that got votes, the most voted first; of equal ones the lower."""
    unit_queries, unit_bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank))
    answers = []
    for query, neighbours in zip(unit_queries, nearest(queries, bank, k, leave_one_out=leave_one_out), strict=True):
        votes = {}
        for i in neighbours:
            votes[labels[i]] = votes.get(labels[i], 0.0) + np.exp(np.dot(query, unit_bank[i]) / temperature)
        answers.append(sorted(votes, key=lambda label: (-votes[label], label)))
    return answers


def chunked_knn(bank, labels, queries, classes, *, ks, temperature, chunks=100) -> dict[int, torch.Tensor]:
    """The classes (Q,) that DINO's evaluation answers, the way it goes about it: for each k anew, chunk by chunk.

    Per chunk of queries the product with the whole transposed bank, its k largest, and the sum over neighbours of
    their one-hot classes (q, k, classes) times exp(similarity / temperature). `bank` (N, D) and `queries` have length
    1; there are at least as many queries as chunks.
    """
    columns = bank.T.contiguous()
    answers = {}
    for k in ks:
        parts = []
        for chunk in queries.split(len(queries) // chunks):
            similarity, place = (chunk @ columns).topk(k, dim=1)
            one_hot = torch.zeros(len(chunk) * k, classes).scatter_(1, labels[place].view(-1, 1), 1.0)
            weight = (similarity / temperature).exp()
            votes = (one_hot.view(len(chunk), k, classes) * weight[:, :, None]).sum(dim=1)
            parts.append(votes.sort(dim=1, descending=True).indices[:, 0])
        answers[k] = torch.cat(parts)
    return answers


def logistic_loss(x, labels, classes, l2, *, steps=50) -> float:
    """The least mean cross-entropy + l2 / 2 |W|² over weights of standardised features and a bias, by Newton."""
    x = torch.as_tensor(x, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    dim = x.shape[1]

    def loss(parameters):
        table = parameters.view(dim + 1, classes)
        log_p = torch.log_softmax(x @ table[:dim] + table[dim], dim=1)
        return -log_p[torch.arange(len(x)), labels].mean() + l2 / 2 * table[:dim].square().sum()

    parameters = torch.zeros((dim + 1) * classes, dtype=torch.float64)
    for _ in range(steps):
        gradient = torch.func.grad(loss)(parameters)
        curvature = torch.func.hessian(loss)(parameters)
        direction = -torch.linalg.pinv(curvature, hermitian=True) @ gradient
        size = 1.0
        while loss(parameters + size * direction) > loss(parameters) and size > 1e-10:
            size /= 2
        parameters = parameters + size * direction
        if gradient.abs().max() < 1e-12:
            break
    return float(loss(parameters))
