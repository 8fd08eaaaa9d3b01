"""Steps that were left out for a loss or gradient that is not finite: counted, written down, and not without end."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ssl_vit.data.pictures import Pictures
from ssl_vit.distributed import rank
from ssl_vit.methods.base import SSLMethod
from ssl_vit.training.journal import Journal
from ssl_vit.transforms.batch import Batch


class SkippedSteps(L.Callback):
    """Writes down which pictures each process saw in a step that was left out, and stops after too many in a row.

    Args:
        journal: Takes a line per step and process: the pictures by index, name and key of their randomness, the loss,
            and the parameters whose gradient was not finite.
        pictures: That the run learns from.
        budget: Steps in a row that may be left out.
    """

    def __init__(self, journal: Journal, pictures: Pictures, *, budget: int) -> None:
        self.journal = journal
        self.pictures = pictures
        self.budget = budget
        self.total = self.in_a_row = 0
        self._seen: list[tuple[int, int]] = []  # index and key of the step's pictures

    @property
    def exhausted(self) -> bool:
        """Whether the run has to stop."""
        return self.in_a_row > self.budget

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}

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
        self._seen += zip(batch.index.tolist(), batch.key.tolist(), strict=True)
        if trainer.global_step == self.step:  # still accumulating
            return
        self.step = trainer.global_step
        seen, self._seen = self._seen, []
        if module.skipped is None or module.skipped.expected:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        self.journal.write(
            self.step - 1,
            process=rank(),
            epoch=trainer.current_epoch,
            loss=str(float(outputs["loss"]) * trainer.accumulate_grad_batches),  # type: ignore[index]
            parameters=module.skipped.parameters,
            pictures=[{"index": index, "name": self.pictures.name(index), "key": key} for index, key in seen],
        )
        if self.exhausted:
            trainer.should_stop = True
