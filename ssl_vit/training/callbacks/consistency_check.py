"""Check that all processes of a run train on the same data, from the same checkpoint, with the same config."""

from __future__ import annotations

import lightning as L

from ssl_vit.runtime.distributed import equal_on_all_ranks
from ssl_vit.runtime.errors import AllRanksError


class ConsistencyCheck(L.Callback):
    """Comparison of texts between all processes before the first step, as each process has found its own files.

    Args:
        texts: What must be equal, by its name in the message.

    Raises:
        AllRanksError: From a hook of Lightning.
    """

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for name, text in self.texts.items():
            if trainer.world_size > 1 and not equal_on_all_ranks(text):
                raise AllRanksError(f"the processes see different {name}")
