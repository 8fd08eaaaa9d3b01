"""Evaluate a published linear probe on the test images every few epochs, as its protocol does."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from tqdm import tqdm

from ssl_vit.data.batch import Batch
from ssl_vit.evaluation.classification.knn import rank_of_true_class
from ssl_vit.runtime.atomic_io import JSONLWriter
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar
from ssl_vit.training.published_protocols import Probe

_STATE = ("accuracy", "best", "last", "losses", "seconds")


class ProbeEvaluation(L.Callback):
    """Test accuracy of each head along the training, with the predictions of its best and its last evaluation.

    Args:
        probe: Whose heads are evaluated.
        features: Of the test images, without augmentation: one or more of (Q, D).
        labels: Of the test images (Q,).
        index: Of the test images in their dataset (Q,).
        journal: Receives a line per epoch.

    Raises:
        UserError: From a hook of Lightning: the loss is not finite.
    """

    def __init__(
        self, probe: Probe, features: list[Tensor], labels: Tensor, index: Tensor, journal: JSONLWriter
    ) -> None:
        self.probe = probe
        self.features = features
        self.labels = labels
        self.index = index
        self.journal = journal
        self.accuracy: dict[str, list[tuple[int, float]]] = {}  # by head: epochs done, test accuracy
        self.best: dict[str, Tensor] = {}  # by head: ranks and predictions (2, Q) of its best evaluation
        self.last: dict[str, Tensor] = {}  # of its last evaluation
        self.losses: list[Tensor] = []  # of the steps of this epoch
        self.seconds = 0.0
        self.bar: tqdm[None] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the evaluations so far, and the losses of an epoch that is interrupted."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state_dict[name])

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._since = time.perf_counter()
        self.bar = progress_bar(total=self.probe.epochs, initial=trainer.current_epoch, unit=" epochs")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())  # type: ignore[index]
        if trainer.is_last_batch:
            self._end_epoch(trainer.current_epoch)
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def _end_epoch(self, epoch: int) -> None:
        loss = float(torch.stack([loss.to(self.labels.device) for loss in self.losses]).mean())
        self.losses = []
        if not loss < float("inf"):
            raise UserError(f"the loss of the linear probe is not finite in epoch {epoch + 1}")
        line: dict[str, Any] = {"lr": self.probe.lr(epoch), "loss": loss}
        if (epoch + 1) % self.probe.every == 0 or epoch + 1 == self.probe.epochs:
            line["test"] = self._evaluate(epoch + 1)
        self.journal.write(epoch, **line)
        if self.bar:
            self.bar.update()

    @torch.no_grad()
    def _evaluate(self, epochs: int) -> dict[str, float]:
        """Evaluate each head, and return its accuracy."""
        for head in self.probe.heads:
            logits = self.probe.logits(head, self.features).cpu()
            predictions = torch.stack([rank_of_true_class(self.labels, logits), logits.argmax(dim=1)])  # (2, Q)
            accuracy = float((predictions[0] == 0).float().mean())
            before = self.accuracy.setdefault(head, [])
            if all(accuracy > other for _, other in before):
                self.best[head] = predictions
            self.last[head] = predictions
            before.append((epochs, accuracy))
        return {head: points[-1][1] for head, points in self.accuracy.items()}

    def on_train_end(self, *_: object) -> None:
        if self.bar:
            self.bar.close()

    def on_exception(self, *_: object) -> None:
        self.on_train_end()
