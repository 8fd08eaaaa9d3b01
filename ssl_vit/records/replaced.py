"""The record of something else that stands where a new one is written: it is kept in `replaced/`, with its files."""

from __future__ import annotations

import glob
import json
import logging
from pathlib import Path

from ssl_vit.records.record import Record, protocol_hash

log = logging.getLogger(__name__)


def make_way(path: Path, record: Record) -> None:
    """Move what stands at `path`, and its files, to `replaced/` unless it is an earlier form of the same record.

    That is one of the same network, by the same protocol, on the same pictures.
    """
    try:
        standing = json.loads(path.read_bytes())
        name = str(standing["id"])[:8]
        known = standing["protocol_hash"], standing["model"]["sha256"], standing["data"]["fingerprints"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or nothing that is worth keeping
        return
    new = protocol_hash(record.task, record.protocol), record.model["sha256"], record.data["fingerprints"]
    if known == new:
        return
    folder = path.parent / "replaced"
    folder.mkdir(exist_ok=True)
    for file in path.parent.glob(f"{glob.escape(path.stem)}.*"):
        file.replace(folder / f"{path.stem}-{name}{file.name.removeprefix(path.stem)}")
    log.warning(f"{path} held a record of other settings, pictures or weights: it is kept in {folder}")
