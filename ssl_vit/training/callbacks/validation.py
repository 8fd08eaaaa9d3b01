"""Features and predictions of a model in training, and the accuracy on validation images during fine-tuning."""

from __future__ import annotations

import logging

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.features.extractor import BackboneExtractor, Features, extract
from ssl_vit.methods.finetune import Classifier, FineTune
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import START_WEIGHTS, LoadedBackbone, load_backbone
from ssl_vit.runtime.device import prefer_fused_attention, upcast
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.run_dir import RunState

log = logging.getLogger(__name__)


class ValidationCallback(L.Callback):
    """Logger of `val/top1` and `val/loss` (cross-entropy) every n epochs and at the end; None: never."""

    def __init__(
        self, dataset: ImageDataset, transform: EvalTransform, *, every_epochs: int | None, skipped: SkippedImageLog
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.every_epochs = every_epochs
        self.skipped = skipped

    def on_train_batch_end(self, trainer: L.Trainer, module: FineTune, *_: object) -> None:  # type: ignore[override]
        if not self.every_epochs or not trainer.is_global_zero:
            return
        if evaluation_due(trainer, self.every_epochs) or trainer.global_step == trainer.max_steps:
            logits, labels, _index = predict(module.student, self.dataset, self.transform, skipped=self.skipped)
            correct = (logits.argmax(dim=1) == labels).float().mean()
            row = {"val/top1": float(correct), "val/loss": float(F.cross_entropy(logits, labels))}
            for logger in trainer.loggers:
                logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)


def evaluation_due(trainer: L.Trainer, every_epochs: int | None) -> bool:
    """Return whether a step ends the last of so many epochs; None: never."""
    return bool(every_epochs and trainer.is_last_batch and (trainer.current_epoch + 1) % every_epochs == 0)


def predict(
    model: Classifier, dataset: ImageDataset, transform: EvalTransform, *, skipped: SkippedImageLog, show: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (N, classes), labels (N,) and indices (N,) of all readable images."""
    features = extract_in_training(model.backbone, dataset, transform, skipped=skipped, show=show)
    with torch.no_grad():
        logits = model.head(features.cls[:, -1].float().to(model.backbone.device))
    return upcast(logits).cpu(), features.labels, features.index


def load_start_weights_of(run: RunState, device: torch.device) -> Backbone | None:
    """Return the weights that a run started from, or None with a warning if the run's file is missing or damaged."""
    try:
        backbone = load_backbone(run.path / START_WEIGHTS, require_cls=False).backbone.to(device)
    except UserError as error:
        log.warning(f"nothing is compared with the start weights: {error}")
        return None
    backbone.set_fused_attention(prefer_fused_attention(device))
    return backbone


def extract_in_training(
    backbone: Backbone, dataset: ImageDataset, transform: EvalTransform, *, skipped: SkippedImageLog, show: bool = False
) -> Features:
    """Return the features of the last block, in evaluation mode, of a backbone that is being trained."""
    extractor = BackboneExtractor(
        LoadedBackbone(backbone, transform.mean, transform.std, "the run", None, None), transform, blocks=1
    )
    training = backbone.training
    backbone.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # these batches have other sizes
            return extract(extractor, dataset, batch_size=256, num_workers=0, skipped=skipped, show=show)
    finally:
        backbone.train(training)
