"""Processes that train together see the same pictures, or do not start."""

from __future__ import annotations

import lightning as L

from ssl_vit.data.pictures import Pictures
from ssl_vit.distributed import agree
from ssl_vit.errors import SharedError


class SamePictures(L.Callback):
    """Compares the lists of pictures before the first step: each process has found its own.

    Raises:
        SharedError: From a hook of Lightning.
    """

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.world_size > 1 and not agree(self.pictures.fingerprint(sizes=False), trainer.strategy.root_device):
            raise SharedError(
                "the processes see different pictures: data.root must be the same folder on every machine"
            )
