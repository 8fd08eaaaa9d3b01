"""Files of plain containers and tensors: nothing else is read from them, as it could run code."""

from __future__ import annotations

import argparse
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ssl_vit.runtime.errors import UserError


def torch_load_weights_only(path: Path) -> dict[str, Any]:
    """A torch file as plain containers and tensors.

    Raises:
        UserError: It is damaged, or holds anything else, which could run code.
    """
    refused = UserError(
        f"{path} is damaged or not a checkpoint of plain tensors; nothing else is read, it could run code"
    )
    try:
        official = torch.serialization.safe_globals([argparse.Namespace])  # official DINO files carry their arguments
        if zipfile.is_zipfile(path):  # with a CRC-32 of each record, which torch does not look at
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise refused
        with warnings.catch_warnings(action="ignore"), official:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises whatever the damage in a file happens to provoke
        raise refused from None
    if not isinstance(content, dict):
        raise refused
    return content
