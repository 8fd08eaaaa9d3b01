"""Accuracy on training pictures that are never learned from, while fine-tuning goes on."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.pictures import Pictures, SkippedPictures
from ssl_vit.evaluation.features import extract
from ssl_vit.methods.finetune import Classifier, FineTuning
from ssl_vit.models.weights import LoadedBackbone
from ssl_vit.precision import at_least_float32
from ssl_vit.transforms.evaluation import EvalTransform

_AT_ONCE = 256  # pictures


class HeldOut(L.Callback):
    """Logs `held_out/top1` and `held_out/loss` (cross-entropy) every n epochs and at the end.

    Args:
        pictures: That nothing is learned from.
        transform: Of the evaluation.
        every_epochs: n; None: never.
        skipped: Takes the pictures that cannot be read.
    """

    def __init__(
        self, pictures: Pictures, transform: EvalTransform, *, every_epochs: int | None, skipped: SkippedPictures
    ) -> None:
        self.pictures = pictures
        self.transform = transform
        self.every_epochs = every_epochs
        self.skipped = skipped

    def on_train_batch_end(self, trainer: L.Trainer, module: FineTuning, *_: object) -> None:  # type: ignore[override]
        if not self.every_epochs or not trainer.is_global_zero:
            return
        due = trainer.is_last_batch and (trainer.current_epoch + 1) % self.every_epochs == 0
        if due or trainer.global_step == trainer.max_steps:
            logits, labels, _places = answer(module.student, self.pictures, self.transform, skipped=self.skipped)
            right = (logits.argmax(dim=1) == labels).float().mean()
            row = {"held_out/top1": float(right), "held_out/loss": float(F.cross_entropy(logits, labels))}
            for logger in trainer.loggers:
                logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)


def answer(
    network: Classifier, pictures: Pictures, transform: EvalTransform, *, skipped: SkippedPictures, show: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, classes), labels (N,) and places (N,) of all pictures that can be read."""
    training = network.training
    network.eval()
    loaded = LoadedBackbone(network.backbone, transform.mean, transform.std, "the run", None, None)
    with torch.compiler.set_stance("force_eager"):  # its batches have sizes of their own
        features = extract(
            loaded, pictures, transform, blocks=1, batch_size=_AT_ONCE, workers=0, skipped=skipped, show=show
        )
    with torch.no_grad():
        head = network.head
        logits = head(features.cls[:, -1].float().to(next(head.parameters()).device))
    network.train(training)
    return at_least_float32(logits).cpu(), features.labels, features.index
