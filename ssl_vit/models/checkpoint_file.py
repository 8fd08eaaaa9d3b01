"""Checkpoint files of runs: their names, and loading that runs no code."""

from __future__ import annotations

import argparse
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ssl_vit.runtime.errors import UserError

CHECKPOINT_KEY = "ssl_vit"  # entry in a Lightning checkpoint with method, backbone and normalization
LAST = "last.ckpt"  # everything that is needed to resume a run


def torch_load_weights_only(path: Path) -> dict[str, Any]:
    """Load a torch file of plain containers and tensors.

    Raises:
        UserError: The file is damaged or contains anything else, which could run code.
    """
    refused = UserError(
        f"{path} is damaged or not a checkpoint of plain tensors; anything else is not read, as it could run code"
    )
    try:
        official = torch.serialization.safe_globals([argparse.Namespace])  # official DINO files contain their arguments
        if zipfile.is_zipfile(path):  # with a CRC-32 of each record, which torch does not check
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise refused
        with warnings.catch_warnings(action="ignore"), official:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # depending on the damage, torch raises anything
        raise refused from None
    if not isinstance(content, dict):
        raise refused
    return content


def set_epoch_counts(checkpoint: dict[str, Any], step: int, steps_per_epoch: int) -> None:
    """Set the epoch counts of a Lightning checkpoint after `step` optimizer steps, from which they follow.

    Resumed at the end of an epoch, Lightning 2.6 counts the next one as not started, and a checkpoint at its end would
    repeat it.
    """
    epoch = (step - 1) // steps_per_epoch  # of the last step
    counts = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        progress.update(counts)
