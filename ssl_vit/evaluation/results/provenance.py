"""Where numbers come from: the program, the machine and the model that they were measured with."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from ssl_vit import __version__
from ssl_vit.config.evaluate import EvalDataConfig, LabeledEvalConfig
from ssl_vit.data.dataset import escape_path
from ssl_vit.data.sources.image_folder import SPLITS
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.device import autocast_dtype, peak_memory

_CHECKOUT = Path(__file__).parents[2]


def package_info() -> dict[str, Any]:
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


def runtime_cost(started: float, device: torch.device) -> dict[str, Any]:
    """Seconds since `started` (of `time.perf_counter`), and the most memory that the process has had in use."""
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": {kind[:-3]: round(gb * 1e9) for kind, gb in peak_memory(device).items()},
    }


def model_metadata(loaded: LoadedBackbone, checkpoint: str, which: str) -> dict[str, Any]:
    """What a record says of a model.

    Args:
        loaded: The model.
        checkpoint: As the user named it.
        which: Of teacher and student, as the user asked for it.
    """
    return {
        "name": model_name(loaded, checkpoint, which),
        "source": loaded.source,
        "sha256": loaded.sha256,
        "state_sha256": loaded.backbone.state_sha256(),
        "weights": loaded.weights,
        "run": None if loaded.run is None else str(loaded.run),
        "epoch": loaded.epoch,
        "step": loaded.step,
        "params": sum(parameter.numel() for parameter in loaded.backbone.parameters()),
        "backbone": loaded.backbone.config.model_dump(mode="json"),
        "normalization": {"mean": loaded.mean, "std": loaded.std},
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


def record_path(task: str, config: LabeledEvalConfig, loaded: LoadedBackbone) -> Path:
    """Where a record goes by default: `eval/` of the run; without a run the current folder, the model in its name."""
    parts = [task, data_name(config.data)]
    if loaded.run is None:
        parts.append(model_name(loaded, config.checkpoint, config.weights))
    else:
        parts += _variant(config.checkpoint, config.weights)
    folder = Path() if loaded.run is None else loaded.run / "eval"
    return folder / f"{'-'.join(part[:80] for part in parts)}.json"


def data_name(data: EvalDataConfig) -> str:
    """What reports call the images: the torchvision data set, or the folder above train/, val/ and test/.

    One of these alone is called by both names, as `lab-train`; two of different data sets are, too, as `lab-field`.
    """
    if data.source != "folder" and data.source != "shards":
        return data.source
    folder = (data.root or data.train or Path()).resolve()
    if data.test is None:
        return escape_path(f"{folder.parent.name}-{folder.name}" if folder.name in SPLITS else folder.name)
    names = [path.parent.name if path.name in SPLITS else path.name for path in (folder, data.test.resolve())]
    return escape_path(names[0] if names[0] == names[1] else "-".join(names))


def model_name(loaded: LoadedBackbone, checkpoint: str, which: str) -> str:
    """What tables and file names call a model: its run; else its timm name, or its file's with a part of its hash."""
    if loaded.run is not None:
        return "-".join([loaded.run.resolve().name, *_variant(checkpoint, which)])
    kind, colon, name = checkpoint.partition(":")
    if loaded.sha256 is not None:
        name = f"{Path(checkpoint).stem}-{loaded.sha256[:8]}{'-student' if which == 'student' else ''}"
    elif not colon:
        name = checkpoint
    elif kind == "random":
        name = f"random-{Path(name).name}"
    return re.sub(r"[^\w.+-]+", "-", name)


def _variant(checkpoint: str, which: str) -> list[str]:
    """What tells apart the models of one run: another checkpoint than the last, the student."""
    file = Path(checkpoint)
    kept = [file.stem] if file.suffix == ".ckpt" and file.stem != "last" else []
    return [*kept, *(["student"] if which == "student" else [])]
