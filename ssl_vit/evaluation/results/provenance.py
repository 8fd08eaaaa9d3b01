"""Where a result comes from: program, machine, model and data, and the file that it is written to."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch

from ssl_vit import __version__
from ssl_vit.config.evaluate import EvalDataConfig, LabeledEvalConfig
from ssl_vit.data.dataset import escape_path
from ssl_vit.data.sources.split_folders import split_role
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.device import autocast_dtype, peak_memory
from ssl_vit.runtime.yaml_file import read_yaml

_CHECKOUT = Path(__file__).parents[3]


@functools.cache
def package_info() -> dict[str, Any]:
    """Return name and version; of a checkout also the commit, and whether tracked files differ from it."""
    commit = _git("rev-parse", "HEAD")
    return {
        "name": "ssl-vit",
        "version": __version__,
        "git": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions of libraries, the device and the dtype of the forward pass."""
    dtype = autocast_dtype(device) or torch.float32
    try:
        faiss = version("faiss-cpu")  # without importing it
    except PackageNotFoundError:  # installed as another package
        faiss = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "faiss": faiss,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "forward": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def runtime_cost(started: float, device: torch.device) -> dict[str, Any]:
    """Return seconds since `started` (of `time.perf_counter`), and the peak memory of the process."""
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": {kind[:-3]: round(gb * 1e9) for kind, gb in peak_memory(device).items()},
    }


def model_metadata(loaded: LoadedBackbone, checkpoint: str, which: str) -> dict[str, Any]:
    """Describe a model in a result; `checkpoint` and `which` (teacher or student) are as the user named them."""
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


def run_config(run: Path | None) -> dict[str, Any]:
    """Return the content of a run's `config.yaml`; empty if it is missing or damaged: no evaluation needs it."""
    try:
        config = read_yaml(run / "config.yaml") if run else None
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def pretraining_seed(run: Path | None) -> int | None:
    """Return the seed of a run, if its `config.yaml` has one."""
    seed = run_config(run).get("seed")
    return seed if isinstance(seed, int) else None


def _git(*args: str) -> str | None:
    """Run git in the checkout; return None for an installed package, and without git."""
    if not (_CHECKOUT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *args], cwd=_CHECKOUT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def result_path(task: str, config: LabeledEvalConfig, loaded: LoadedBackbone) -> Path:
    """Return the default path of a result: in `eval/` of the run, else in the current folder with the model's name."""
    if loaded.run is None:
        folder, model = Path(), [model_name(loaded, config.checkpoint, config.weights)]
    else:
        folder, model = loaded.run / "eval", _variant(config.checkpoint, config.weights)
    return folder / f"{'-'.join(part[:80] for part in (task, data_name(config.data), *model))}.json"


def data_inputs(data: EvalDataConfig) -> dict[str, Path | None]:
    """Return the folders of images by their keys, which no output may be written into."""
    return {"data.root": data.root, "data.train": data.train, "data.test": data.test}


def data_name(data: EvalDataConfig) -> str:
    """Return the name of the images: the torchvision dataset, or the folder above train/, val/ and test/.

    One of these folders alone is named by both, as `lab-train`; two of different datasets are, too, as `lab-field`.
    """
    if data.source != "folder" and data.source != "shards":
        return data.source
    folder = (data.root or data.train or Path()).resolve()
    if data.test is None:
        return escape_path(f"{folder.parent.name}-{folder.name}" if split_role(folder.name) else folder.name)
    names = [path.parent.name if split_role(path.name) else path.name for path in (folder, data.test.resolve())]
    return escape_path(names[0] if names[0] == names[1] else "-".join(names))


def model_name(loaded: LoadedBackbone, checkpoint: str, which: str) -> str:
    """Return the model's name in tables and files: of its run, or of timm, or of its file with a part of its hash."""
    if loaded.run is not None:
        return "-".join([escape_path(loaded.run.resolve().name), *_variant(checkpoint, which)])
    kind, colon, name = checkpoint.partition(":")
    if loaded.sha256 is not None:
        name = "-".join([Path(checkpoint).stem, loaded.sha256[:8], *(["student"] if which == "student" else [])])
    elif not colon:
        name = checkpoint
    elif kind == "random":
        name = f"random-{Path(name).name}"
    return re.sub(r"[^\w.+-]+", "-", name)


def _variant(checkpoint: str, which: str) -> list[str]:
    """Return what distinguishes models of one run: a checkpoint other than the last, the student."""
    file = Path(checkpoint)
    kept = [file.stem] if file.suffix == ".ckpt" and file.stem != "last" else []
    return [*kept, *(["student"] if which == "student" else [])]
