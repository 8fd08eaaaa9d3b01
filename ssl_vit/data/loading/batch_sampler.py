"""Batch sampler whose order is a pure function of (seed, epoch), so that a run resumes without stored state."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssl_vit.runtime.rng import sample_keys, step_seed

SampleKey = tuple[int, int]  # an image's index and its RNG key


class ResumableBatchSampler:
    """The micro-batches of one process, epoch by epoch, as lists of indices with RNG keys.

    An epoch is a permutation of all images, split into optimizer steps of batch_size x world x accumulate images; the
    remainder is dropped. A step has the same images with the same keys for any number of processes: each takes its
    slice of every micro-batch. If there are fewer images than one step needs, they are repeated, each time with
    another key. The first epoch starts after the first `first_step` optimizer steps.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int, rank: int, world: int, accumulate: int, first_step: int = 0
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        step_size = batch_size * world * accumulate
        steps = max(1, count // step_size)
        self.repeats = -(-step_size // count) if count < step_size else 1  # of each image in an epoch
        self._length = steps * accumulate
        self._first_epoch, self._first_batch = first_step // steps, first_step % steps * accumulate
        self.epoch = self._first_epoch

    @property
    def sampler(self) -> ResumableBatchSampler:
        """Return self: Lightning calls `set_epoch` on `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of micro-batches per epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[SampleKey]]:
        indices = self._order().view(self._length, self.world, self.batch_size)[:, self.rank]
        keys = sample_keys(self.seed, self.epoch, indices)  # (batches, B)
        start = self._first_batch if self.epoch == self._first_epoch else 0
        for batch in range(start, self._length):
            yield list(zip((indices[batch] % self.count).tolist(), keys[batch].tolist(), strict=True))

    def _order(self) -> Tensor:
        """Return the epoch's images in order (M,); the n-th repetition of image i is i + n x count."""
        generator = torch.Generator().manual_seed(step_seed(self.seed, self.epoch))
        permutation = torch.randperm(self.count, generator=generator)
        offsets = torch.arange(self.repeats)[:, None] * self.count
        return (offsets + permutation).flatten()[: self._length * self.world * self.batch_size]
