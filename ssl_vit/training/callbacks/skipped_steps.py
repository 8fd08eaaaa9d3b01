"""Count and log the optimizer steps that were skipped because a loss or gradient was not finite."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from ssl_vit.data.batch import Batch
from ssl_vit.data.dataset import ImageDataset
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.gradient_clipping import FiniteCheck
from ssl_vit.runtime.atomic_io import JSONLWriter
from ssl_vit.runtime.distributed import rank
from ssl_vit.runtime.text import pluralize


class _Step(NamedTuple):
    number: int
    epoch: int
    loss: Tensor  # ()
    images: list[tuple[int, int]]  # index and key of each
    check: FiniteCheck


class SkippedSteps(L.Callback):
    """Log of the images that each process had in a skipped step; it stops the run after too many steps in a row.

    The journal receives a line per step and process: the training images by index, name and random key, the loss, and
    the parameters whose gradient was not finite.
    """

    def __init__(self, journal: JSONLWriter, dataset: ImageDataset, *, max_in_a_row: int) -> None:
        self.journal = journal
        self.dataset = dataset
        self.max_in_a_row = max_in_a_row
        self.total = self.in_a_row = 0
        self.exhausted = False  # whether the run has to stop
        self._images: list[tuple[int, int]] = []  # index and key of the images of this step so far
        self._pending: deque[_Step] = deque()  # steps of which the CPU does not know yet whether they were applied

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; a run that resumes from them may skip at least one more step."""
        self._count_pending()
        return {"total": self.total, "in_a_row": min(self.in_a_row, self.max_in_a_row)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.in_a_row = state_dict["total"], state_dict["in_a_row"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: SSLMethod,  # type: ignore[override]
        outputs: STEP_OUTPUT,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._images += zip(batch.index.tolist(), batch.key.tolist(), strict=True)
        if trainer.global_step == self.step:  # still accumulating
            return
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches  # type: ignore[index]
        self._pending.append(_Step(self.step, trainer.current_epoch, loss, self._images, module.check))
        self.step, self._images = trainer.global_step, []
        # A GPU is left one step behind: asked for this step, the CPU would wait until it is finished.
        self._count_pending(keep=1 if loss.is_cuda else 0)
        if self.exhausted:
            trainer.should_stop = True

    def on_train_end(self, *_: object) -> None:
        self._count_pending()

    def summary(self) -> list[str]:
        """Return a line about the skipped steps, if there are any."""
        if not self.total:
            return []
        steps = pluralize(self.total, "step")
        return [f"Skipped {steps} with a loss or gradient that is not finite: {self.journal.path} lists their images"]

    def _count_pending(self, *, keep: int = 0) -> None:
        """Count the pending steps, except the newest `keep`, and log those that were skipped."""
        while len(self._pending) > keep:
            step = self._pending.popleft()
            skipped = step.check.skipped()
            if skipped is None or skipped.expected:
                self.in_a_row = 0
                continue
            self.total += 1
            self.in_a_row += 1
            self.exhausted |= self.in_a_row > self.max_in_a_row
            self.journal.write(
                step.number,
                process=rank(),
                epoch=step.epoch,
                loss=str(float(step.loss)),
                parameters=skipped.parameters,
                images=[{"index": index, "name": self.dataset.name(index), "key": key} for index, key in step.images],
            )
