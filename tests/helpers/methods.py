"""Batches and single steps for tests of methods."""

import torch

from ssl_vit.data.batch import Batch
from ssl_vit.runtime.rng import sample_keys


def batch_of(views, count=4):
    """Return random crops as the loader returns them."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(count)

    def crops(config):
        shape = (count, config.count, 3, config.size, config.size)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return Batch(crops(views.global_crops), crops(views.local_crops), index % 2, index, sample_keys(0, 0, index))


def run_step(method, batch):
    """Run one step of the method on augmented views, without a Trainer."""
    global_views = method.color_augmentation(batch.global_views, batch.key)
    local_views = method.color_augmentation(batch.local_views, batch.key, first_view=2)
    return method.step(global_views, local_views, batch)


def dense(logits):
    """Return all logits (N, K)."""
    return logits.block(slice(None))
