"""kNN accuracy while the run goes on, where the pictures have labels: the number that tells whether it learns."""

from __future__ import annotations

import logging
from typing import cast

import lightning as L
import torch

from ssl_vit.config import PretrainConfig
from ssl_vit.data.pictures import Pictures, SkippedPictures, Subset
from ssl_vit.errors import UserError
from ssl_vit.evaluation.features import Features, extract
from ssl_vit.evaluation.knn import Labelled, knn_accuracy
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.weights import LoadedBackbone
from ssl_vit.transforms.evaluation import EvalTransform

log = logging.getLogger(__name__)


class OnlineKNN(L.Callback):
    """Logs `knn/top1` before the first step, every n epochs and at the end.

    The labelled pictures for it are chosen once, by the seed. A fifth of them at most are queries, which are never in
    the bank. The labels are for this number alone. Without at least two class folders and five labelled pictures
    there is nothing to do.
    """

    def __init__(self, config: PretrainConfig, pictures: Pictures, skipped: SkippedPictures) -> None:
        self.config = config
        self.skipped = skipped
        labelled = (pictures.labels >= 0).nonzero().squeeze(1)
        order = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(config.seed))]
        queries = min(config.online_knn.queries, len(order) // 5)
        enough = queries > 0 and len(pictures.classes) > 1
        self.every_epochs = config.online_knn.every_epochs if enough else None
        self.queries = Subset(pictures, order[:queries])
        self.bank = Subset(pictures, order[queries : queries + config.online_knn.bank])
        views = config.method.views
        self.transform = EvalTransform(views.global_crops.size, 0.875, views.mean, views.std)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.every_epochs and trainer.global_step == 0:
            self._measure(trainer, module, step=0)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        at_end = trainer.global_step == trainer.max_steps
        due = trainer.is_last_batch and self.every_epochs and (trainer.current_epoch + 1) % self.every_epochs == 0
        if due or (at_end and self.every_epochs):
            self._measure(trainer, module, step=trainer.global_step - 1)

    def _measure(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        if not trainer.is_global_zero:
            return
        backbone = cast(Backbone, module.target)
        training = backbone.training
        backbone.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # its batches have sizes of their own
                bank, queries = (self._features(backbone, pictures) for pictures in (self.bank, self.queries))
        except UserError as error:  # the pictures are gone from the disk, and training may go on from memory
            log.warning(f"no kNN at step {step:,}: {error}")
            return
        finally:
            backbone.train(training)
        accuracy = knn_accuracy(
            Labelled(bank.cls[:, -1], bank.labels),
            Labelled(queries.cls[:, -1], queries.labels),
            k=self.config.online_knn.k,
        )
        for logger in trainer.loggers:
            logger.log_metrics({"knn/top1": accuracy, "epoch": trainer.current_epoch}, step=step)

    def _features(self, backbone: Backbone, pictures: Subset) -> Features:
        views = self.config.method.views
        return extract(
            LoadedBackbone(backbone, views.mean, views.std, "the run", None, None),
            pictures,
            self.transform,
            blocks=1,
            batch_size=256,
            workers=0,
            skipped=self.skipped,
            show=False,
        )
