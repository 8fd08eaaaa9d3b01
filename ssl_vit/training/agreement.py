"""Processes that train together start from the same, or not at all."""

from __future__ import annotations

import lightning as L

from ssl_vit.distributed import agree
from ssl_vit.errors import SharedError
from ssl_vit.training.runs import AnyRun, Start


class SameStart(L.Callback):
    """Compares pictures, checkpoint and configuration before the first step: each process has found its own.

    Raises:
        SharedError: From a hook of Lightning.
    """

    def __init__(self, config: AnyRun, start: Start) -> None:
        self.parts = {
            "pictures (data.root must be the same folder on every machine)": start.pictures.fingerprint(sizes=False),
            "checkpoints (run.folder must be the same folder on every machine)": f"{start.checkpoint} {start.done}",
            "configurations": repr(config),
        }

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for what, text in self.parts.items():
            if trainer.world_size > 1 and not agree(text):
                raise SharedError(f"the processes see different {what}")
