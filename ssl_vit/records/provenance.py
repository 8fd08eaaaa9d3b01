"""Where numbers come from: the program, the machine and the network that they were measured with."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from ssl_vit import __version__
from ssl_vit.models.weights import LoadedBackbone, state_sha256
from ssl_vit.records.naming import model_name
from ssl_vit.training.hardware import autocast_dtype, peak_memory

_CHECKOUT = Path(__file__).parents[2]


def tool() -> dict[str, Any]:
    """Name and version; of a checkout the commit, and whether files that git knows differ from it."""
    commit = _git("rev-parse", "HEAD")
    return {
        "name": "ssl-vit",
        "version": __version__,
        "git": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were computed with."""
    dtype = autocast_dtype(device) or torch.float32
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "faiss": _faiss(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "forward": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _faiss() -> str | None:
    """Its version, without importing it; None where it was not installed as the package that we name."""
    try:
        return version("faiss-cpu")
    except PackageNotFoundError:
        return None


def cost(started: float, device: torch.device) -> dict[str, Any]:
    """Seconds since `started` (of `time.perf_counter`), and the most memory that the process has had in use."""
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": {kind[:-3]: round(gb * 1e9) for kind, gb in peak_memory(device).items()},
    }


def network(loaded: LoadedBackbone, checkpoint: str, which: str) -> dict[str, Any]:
    """What a record says of a network.

    Args:
        loaded: The network.
        checkpoint: As the user named it.
        which: Of teacher and student, as the user asked for it.
    """
    return {
        "name": model_name(loaded, checkpoint, which),
        "source": loaded.source,
        "sha256": loaded.sha256,
        "state_sha256": state_sha256(loaded.backbone.vit.state_dict()),
        "weights": loaded.weights,
        "run": None if loaded.run is None else str(loaded.run),
        "epoch": loaded.epoch,
        "step": loaded.step,
        "params": sum(parameter.numel() for parameter in loaded.backbone.parameters()),
        "backbone": loaded.backbone.config.model_dump(mode="json"),
        "normalisation": {"mean": loaded.mean, "std": loaded.std},
    }


def pretraining_seed(run: Path | None) -> int | None:
    """The seed in a run's `config.yaml`, if there is such a file and it can be read."""
    path = None if run is None else run / "config.yaml"
    if path is None or not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):  # the evaluation does not need it
        return None
    seed = config.get("seed") if isinstance(config, dict) else None
    return seed if isinstance(seed, int) else None


def _git(*words: str) -> str | None:
    """What git says of the checkout; None for an installed package, and without git."""
    if not (_CHECKOUT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], cwd=_CHECKOUT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
