"""Slow textbook forms of the classifiers on frozen features: loops, float64."""

from __future__ import annotations

import numpy as np
import torch


def nearest(queries, train, k, *, leave_one_out=False) -> list[list[int]]:
    """Return the k rows of largest cosine of each query; among equal ones the first."""
    queries, train = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, train))
    lists = []
    for q, query in enumerate(queries):
        similarity = [float(np.dot(query, row)) for row in train]
        others = [i for i in range(len(train)) if not (leave_one_out and i == q)]
        lists.append(sorted(others, key=lambda i: (-similarity[i], i))[:k])
    return lists


def knn_classes(queries, train, labels, k, temperature, *, leave_one_out=False) -> list[list[int]]:
    """Return the classes with votes of each query, most votes first; among equal ones the lower class."""
    unit_queries, unit_train = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, train))
    predictions = []
    for query, neighbors in zip(unit_queries, nearest(queries, train, k, leave_one_out=leave_one_out), strict=True):
        votes = {}
        for i in neighbors:
            votes[labels[i]] = votes.get(labels[i], 0.0) + np.exp(np.dot(query, unit_train[i]) / temperature)
        predictions.append(sorted(votes, key=lambda label: (-votes[label], label)))
    return predictions


def chunked_knn(train, labels, queries, classes, *, ks, temperature, chunks=100) -> dict[int, torch.Tensor]:
    """Return the classes (Q,) as in DINO's evaluation: one search per k, chunk by chunk.

    Per chunk of queries: the product with all train features, its k largest, and the sum over neighbors of
    their one-hot classes (q, k, classes) times exp(similarity / temperature). `train` (N, D) and `queries` have length
    1; there are at least as many queries as chunks.
    """
    columns = train.T.contiguous()
    predictions = {}
    for k in ks:
        parts = []
        for chunk in queries.split(len(queries) // chunks):
            similarity, indices = (chunk @ columns).topk(k, dim=1)
            one_hot = torch.zeros(len(chunk) * k, classes).scatter_(1, labels[indices].view(-1, 1), 1.0)
            weight = (similarity / temperature).exp()
            votes = (one_hot.view(len(chunk), k, classes) * weight[:, :, None]).sum(dim=1)
            parts.append(votes.sort(dim=1, descending=True).indices[:, 0])
        predictions[k] = torch.cat(parts)
    return predictions


def logistic_loss(x, labels, classes, l2, *, steps=50) -> float:
    """Minimize mean cross-entropy + l2 / 2 |W|² over weights of standardized features and a bias, by Newton."""
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


def ridge(z, targets, penalty) -> np.ndarray:
    """Return the (D + 1, C) that minimize |z w + b - targets|² + penalty |w|²; the last row is the bias b."""
    z, targets = (np.asarray(x, dtype=np.float64) for x in (z, targets))
    dim = z.shape[1]
    with_bias = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    regularizer = np.sqrt(penalty) * np.eye(dim, dim + 1)
    stacked = np.concatenate([with_bias, regularizer]), np.concatenate([targets, np.zeros((dim, targets.shape[1]))])
    return np.linalg.lstsq(*stacked, rcond=None)[0]


def ridge_leave_one_out(z, targets, penalty) -> torch.Tensor:
    """Return the scores (N, C) of each image by a ridge regression fitted to all others."""
    z, targets = (np.asarray(x, dtype=np.float64) for x in (z, targets))
    scores = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        scores.append(np.append(z[i], 1.0) @ ridge(z[others], targets[others], penalty))
    return torch.tensor(np.stack(scores))


def subset(labels, counts, order) -> list[int]:
    """Return the rows whose position within their class is below the class's count."""
    return [row for row, (label, n) in enumerate(zip(labels, order.tolist(), strict=True)) if n < counts[label]]


def ridge_by_refits(x, labels, test, classes, l2) -> tuple[torch.Tensor, float]:
    """Return scores (Q, C) of scikit-learn's ridge onto ±1, and the mean squared error of leave-one-out refits."""
    from sklearn.linear_model import Ridge

    x, test = (torch.as_tensor(part).double().numpy() for part in (x, test))
    std = x.std(axis=0)
    z, test = (x - x.mean(axis=0)) / std, (test - x.mean(axis=0)) / std
    targets = np.where(np.arange(classes) == np.asarray(labels)[:, None], 1.0, -1.0)
    ridge = Ridge(alpha=len(z) * l2, solver="svd")
    errors = []
    for i in range(len(z)):
        others = np.arange(len(z)) != i
        prediction = ridge.fit(z[others], targets[others]).predict(z[i : i + 1])[0]
        errors.append(((prediction - targets[i]) ** 2).sum())
    return torch.tensor(ridge.fit(z, targets).predict(test)), float(np.mean(errors))


def sgd_head(x, labels, classes, *, lr, weight_decay, batches) -> torch.nn.Linear:
    """Train a linear layer from zero by `torch.optim.SGD`, half a cosine to learning rate 0, no decay of the bias.

    `x` (N, D) are standardized features, `batches` the image indices of every step.
    """
    head = torch.nn.Linear(x.shape[1], classes, dtype=x.dtype)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": weight_decay}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + np.cos(np.pi * i / len(batches))) / 2)
    for indices in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(x[indices]), labels[indices]).backward()
        optimizer.step()
        schedule.step()
    return head
