"""State of a published linear probe: saved after every epoch, to resume from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ssl_vit.models.checkpoint_file import torch_load_weights_only
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.published_protocols import Probe

STATE = "state.pt"


@dataclass
class ProbeState:
    """How far a probe has come, apart from its weights."""

    tested: Tensor  # (Q,) places of the test images that could be read
    epoch: int = 0  # that are done
    seconds: float = 0.0
    accuracy: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by head: epochs done, test accuracy
    best: dict[str, Tensor] = field(default_factory=dict)  # by head: ranks and predictions (2, Q) of its best epoch
    last: dict[str, Tensor] = field(default_factory=dict)  # of the last look


def read_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the saved state of this probe; None if there is none.

    Raises:
        UserError: It holds a probe of something else, or a damaged state.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    content = torch_load_weights_only(path)
    changed = [name for name, value in identity.items() if content["identity"].get(name) != value]
    if changed:
        raise UserError(
            f"{folder} holds a probe with another {' and another '.join(changed)}: delete the folder, or name another "
            "record with out=OTHER.json"
        )
    return content


def resume(content: dict[str, Any] | None, probe: Probe, tested: Tensor) -> ProbeState:
    """Where the probe stands, its weights and its optimizer filled in.

    It starts from scratch if other test images (Q,) can be read than before: their evaluations could not be compared.
    """
    if content is None or not torch.equal(content["course"]["tested"], tested):
        return ProbeState(tested)
    probe.heads.load_state_dict(content["heads"])
    probe.optimizer.load_state_dict(content["optimizer"])
    return ProbeState(**content["course"])


def save_state(folder: Path, probe: Probe, identity: dict[str, Any], course: ProbeState) -> None:
    """Write what `read_state` reads."""
    with atomic_write(folder / STATE) as file:
        content = {
            "identity": identity,
            "heads": probe.heads.state_dict(),
            "optimizer": probe.optimizer.state_dict(),
            "course": vars(course),
        }
        torch.save(content, file)


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Keep other commands out of the folder, which is made.

    Raises:
        UserError: One is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            yield
    except Timeout:
        raise UserError(f"another command trains a probe in {folder}; wait for it, or name out=OTHER.json") from None
