"""Steps that were left out for a loss or gradient that is not finite: counted, written down, and not without end."""

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
from ssl_vit.runtime.distributed import rank
from ssl_vit.runtime.jsonl import JSONLWriter


class _Step(NamedTuple):
    number: int
    epoch: int
    loss: Tensor  # ()
    seen: list[tuple[int, int]]  # index and key of its images
    check: FiniteCheck


class SkippedSteps(L.Callback):
    """Writes down which images each process saw in a step that was left out, and stops after too many in a row.

    Args:
        journal: Takes a line per step and process: the images by index, name and key of their randomness, the loss,
            and the parameters whose gradient was not finite.
        images: That the run learns from.
        budget: Steps in a row that may be left out.
    """

    def __init__(self, journal: JSONLWriter, dataset: ImageDataset, *, budget: int) -> None:
        self.journal = journal
        self.dataset = dataset
        self.budget = budget
        self.total = self.in_a_row = 0
        self.exhausted = False  # whether the run has to stop
        self._images: list[tuple[int, int]] = []  # index and key of the images of the step at hand
        self._open: deque[_Step] = deque()  # steps of which the CPU does not know yet whether they were taken

    def state_dict(self) -> dict[str, Any]:
        """The counts. A run that goes on from a checkpoint has at least one more step of its budget."""
        self._settle()
        return {"total": self.total, "in_a_row": min(self.in_a_row, self.budget)}

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
        self._open.append(_Step(self.step, trainer.current_epoch, loss, self._images, module.check))
        self.step, self._images = trainer.global_step, []
        # A GPU is left one step behind: asked for the step at hand, it would have to finish it while the CPU waits.
        self._settle(but=1 if loss.is_cuda else 0)
        if self.exhausted:
            trainer.should_stop = True

    def on_train_end(self, *_: object) -> None:
        self._settle()

    def _settle(self, *, but: int = 0) -> None:
        """Count the steps that are open, but for the newest ones, and write down those that were left out."""
        while len(self._open) > but:
            step = self._open.popleft()
            skipped = step.check.skipped()
            if skipped is None or skipped.expected:
                self.in_a_row = 0
                continue
            self.total += 1
            self.in_a_row += 1
            self.exhausted |= self.in_a_row > self.budget
            self.journal.write(
                step.number,
                process=rank(),
                epoch=step.epoch,
                loss=str(float(step.loss)),
                parameters=skipped.parameters,
                dataset=[{"index": index, "name": self.dataset.name(index), "key": key} for index, key in step.seen],
            )
