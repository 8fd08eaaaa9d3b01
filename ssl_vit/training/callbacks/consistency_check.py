"""Processes that train together start from the same, or not at all."""

from __future__ import annotations

import lightning as L

from ssl_vit.runtime.distributed import equal_on_all_ranks
from ssl_vit.runtime.errors import AllRanksError
from ssl_vit.training.run_dir import AnyRun, RunState


class ConsistencyCheck(L.Callback):
    """Compares images, checkpoint and configuration before the first step: each process has found its own.

    Raises:
        AllRanksError: From a hook of Lightning.
    """

    def __init__(self, config: AnyRun, start: RunState) -> None:
        self.parts = {
            "images (data.root must be the same folder on every machine)": start.dataset.fingerprint(sizes=False),
            "checkpoints (run.folder must be the same folder on every machine)": f"{start.checkpoint} {start.done}",
            "configurations": repr(config),
        }

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for what, text in self.parts.items():
            if trainer.world_size > 1 and not equal_on_all_ranks(text):
                raise AllRanksError(f"the processes see different {what}")
