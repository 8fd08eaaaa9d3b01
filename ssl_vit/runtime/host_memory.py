"""The memory of this machine that the system and the container allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class HostMemory(NamedTuple):
    """Bytes."""

    available: int  # to this process now, without swapping
    total: int  # with swap


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """Return the memory of this machine, or of its container; None where the system does not tell (no Linux)."""
    info = root / "proc/meminfo"
    if not info.is_file():
        return None
    found = {name: int(value) << 10 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", info.read_text(), flags=re.M)}
    available, total = found.get("MemAvailable", 0), found.get("MemTotal", 0)
    swap = found.get("SwapTotal", 0)
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = (_number(root / "sys/fs/cgroup" / name) for name in (limit_name, used_name))
        if limit is not None and limit < total:
            total, swap = limit, 0
            available = min(available, limit - (used or 0))
    return HostMemory(available, total + swap) if total else None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
