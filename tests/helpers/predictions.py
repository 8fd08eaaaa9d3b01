"""Predictions of a classifier for tests."""

import torch

from ssl_vit.evaluation.results.eval_result import Predictions


def make_predictions(count, classes, *, right=0.6, seed=0):
    """Make predictions for images 0, 1, ... of classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(count) % classes
    rank = torch.randint(1, classes, (count,), generator=generator)
    rank[torch.rand(count, generator=generator) < right] = 0
    predicted = torch.where(rank == 0, target, (target + rank) % classes)
    return Predictions(torch.arange(count), target, predicted, rank)
