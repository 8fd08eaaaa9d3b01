"""Which images each step sees, as a pure function of (seed, epoch): nothing to store, nothing to replay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssl_vit.runtime.rng import sample_keys, step_seed

SampleKey = tuple[int, int]  # an image's index, and the key of its randomness


class ResumableBatchSampler:
    """The micro-batches of one process, epoch by epoch, as lists of picks.

    An epoch is a permutation of all images, cut into optimizer steps of batch_size x world x accumulate images; the
    remainder is left out. A step is the same dataset with the same keys for any number of processes: each takes
    its slice of every micro-batch. Fewer images than one step holds are repeated to fill one, each time with another
    key.

    Args:
        count: Images in the data set.
        batch_size: Images per micro-batch and process.
        seed: Of the run.
        rank: This process.
        world: Processes.
        accumulate: Micro-batches per optimizer step.
        first_step: Optimizer steps already done; the epoch they end in begins behind them.
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
        """Itself: Lightning calls `set_epoch` on `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose what the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches per epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[SampleKey]]:
        places = self._order().view(self._length, self.world, self.batch_size)[:, self.rank]
        keys = sample_keys(self.seed, self.epoch, places)  # (batches, B)
        start = self._first_batch if self.epoch == self._first_epoch else 0
        for batch in range(start, self._length):
            yield list(zip((places[batch] % self.count).tolist(), keys[batch].tolist(), strict=True))

    def _order(self) -> Tensor:
        """The epoch's images in their order (M,); the n-th repetition of image i is i + n x count."""
        generator = torch.Generator().manual_seed(step_seed(self.seed, self.epoch))
        permutation = torch.randperm(self.count, generator=generator)
        turns = torch.arange(self.repeats)[:, None] * self.count
        return (turns + permutation).flatten()[: self._length * self.world * self.batch_size]
