"""What was measured, in words for the terminal and in plain values for a file."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import lightning
import timm
import torch

from ssl_vit import __version__
from ssl_vit.config.pretrain import TrainingConfig
from ssl_vit.runtime.device import autocast_dtype
from ssl_vit.runtime.workers import available_cpus
from ssl_vit.training.benchmark import Model, Row

SCHEMA = 1  # of the file
WAITING = 0.1  # share of a step from which on data are the bottleneck
SLOWED = 0.8  # of the speed without data, below which loading takes cores from the step
BUSY = 0.4  # share of the matmul peak from which on a model is what the machine gives

ROWS = {"data": "data only", "synthetic": "synthetic", "full": "full"}
_LESS_OF_IT = {
    "augmentation": "fewer views, a smaller share of blurred ones (method.views.blur.p) and no hue shift "
    "(method.views.jitter.hue=0) make it cheaper",
    "corruption": "fewer and larger blocks (method.corruption) make it cheaper",
    "loss": "fewer prototypes (method.head.prototypes) or a smaller embedding make it cheaper",
    "clip": "a larger data.batch_size spreads it over more images",
    "optimizer": "a larger data.batch_size spreads it over more images",
    "ema": "a larger data.batch_size spreads it over more images",
    "other": "a larger data.batch_size or trainer.log_every_n_steps spreads it over more images",
}


class Measured(NamedTuple):
    """A configuration and what was found of it."""

    config: TrainingConfig  # as measured: its batch size may be smaller than was asked for
    model: Model
    peak: float  # FLOP/s of a matrix product at the model's precision
    rows: dict[str, list[Row]]  # by name, one for each round

    def typical(self, row: str) -> float:
        """Images/s, the median of the rounds."""
        return median(each.images_per_s for each in self.rows[row])

    def share(self, row: str) -> float:
        """Of the matmul peak."""
        return self.typical(row) * self.model.flops.total / self.peak


class Comparison(NamedTuple):
    """How much faster the second configuration is than the first."""

    row: str
    overrides: list[str]  # of the second
    batch_sizes: list[int]  # that the two were measured with
    ratios: list[float]  # of images/s, by round

    def __str__(self) -> str:
        sizes = " and ".join(map(str, self.batch_sizes))
        return (
            f"B / A = {median(self.ratios):.2f} in images/s of the {ROWS[self.row]} row, the median of "
            f"{len(self.ratios)} rounds (from {min(self.ratios):.2f} to {max(self.ratios):.2f}); "
            f"B is A with {' '.join(self.overrides)}; measured with batches of {sizes}"
        )


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the configuration; to be asked before they are measured."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), flags=re.M) if info.exists() else []
    return {
        "ssl_vit": __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": names[0] if names else platform.processor(),
        "cores": available_cpus(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if sys.platform != "win32" else None,  # processes that wanted a core, last minute
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
    }


def as_values(
    subjects: list[Measured], comparison: Comparison | None, dataset: list[str], environment: dict[str, Any]
) -> dict[str, Any]:
    """Everything, as plain values; seconds, GB, FLOP and FLOP/s."""
    return {
        "schema": SCHEMA,
        "environment": environment,
        "measured": [
            {
                "images": described,
                "batch_size": subject.config.data.batch_size,
                "precision": subject.model.precision,
                "flops_per_image": subject.model.flops.parts() | {"total": subject.model.flops.total},
                "matmul_peak": subject.peak,
                "rows": {
                    name: {
                        "images_per_s": subject.typical(name),
                        "flops": subject.typical(name) * subject.model.flops.total if name != "data" else None,
                        "peak_share": subject.share(name) if name != "data" else None,
                        "rounds": [row._asdict() for row in rounds],
                    }
                    for name, rounds in subject.rows.items()
                },
                "config": subject.config.model_dump(mode="json"),
            }
            for subject, described in zip(subjects, dataset, strict=True)
        ],
        "comparison": comparison and comparison._asdict() | {"ratio": median(comparison.ratios)},
    }


def table(subject: Measured) -> str:
    """The rows, the parts of a step, and what the shares are shares of."""
    flops = subject.model.flops
    lines = [f"{'':<14}{'images/s':>12}{'TFLOP/s':>10}{'of peak':>9}{'steps':>7}"]
    for name, rounds in subject.rows.items():
        speed, steps = subject.typical(name), sum(row.steps for row in rounds)
        rate = f"{speed * flops.total / 1e12:>10.3g}{subject.share(name):>9.0%}" if name != "data" else f"{'':>19}"
        lines.append(f"{ROWS[name]:<14}{_short(speed):>12}{rate}{steps:>7,}")
    name, rounds = list(subject.rows.items())[-1]
    parts = {part: median(row.parts[part] for row in rounds) for part in rounds[0].parts}
    step = sum(parts.values())
    lines += ["", f"{'a step, ' + ROWS[name]:<14}{'ms':>12}{'share':>10}"]
    lines += [f"{part:<14}{1000 * seconds:>12,.1f}{seconds / step:>10.1%}" for part, seconds in parts.items()]
    memory = {place: max(row.memory[place] for row in rounds) for place in rounds[0].memory}
    places = {"host_gb": "host (without loading processes)", "device_gb": "device"}
    lines += [
        "",
        f"{_short(flops.total / 1e9)} GFLOP per image: "
        + ", ".join(f"{name} {_short(part / 1e9)}" for name, part in flops.parts().items()),
        f"matmul peak {subject.peak / 1e12:.3g} TFLOP/s in {subject.model.precision.removesuffix('-mixed')}",
        "peak memory: " + ", ".join(f"{gb:.2f} GB {places[place]}" for place, gb in memory.items()),
    ]
    return "\n".join(lines)


def bottleneck(subject: Measured, device: torch.device) -> str:
    """What limits the full row, in one sentence, and what to change."""
    parts = subject.rows["full"][-1].parts
    step = sum(parts.values())
    waiting = parts["data"] / step
    loader, training = subject.typical("data"), subject.typical("synthetic")
    speed = subject.typical("full") / training
    part = max(parts, key=parts.__getitem__)
    if part == "data" or (waiting > WAITING and (loader < training or speed < SLOWED)):
        return (
            f"Bottleneck: data, {waiting:.0%} of a step: the loader alone gives {_short(loader)} images/s, training "
            f"alone takes {_short(training)}"
            + (", and the two share the cores" if loader > training else "")
            + "; more cores, smaller files, or a data.cache_gb that holds all images help."
        )
    took = f"{_short(1000 * parts[part])} of {_short(1000 * step)} ms"
    said = f"Bottleneck: {part}, {parts[part] / step:.0%} of a step ({took})"
    if speed < SLOWED:
        said += f", which loading slows down to {speed:.0%} of its speed without"
    if part in _LESS_OF_IT:
        return f"{said}; {_LESS_OF_IT[part]}."
    share = subject.share("full")
    said = f"{said}, with the whole step at {share:.0%} of the matmul peak"
    if subject.model.precision == "32-true" and autocast_dtype(device):
        return f"{said}; this machine computes faster with trainer.precision=bf16-mixed."
    if share < BUSY:
        return f"{said}; a larger data.batch_size may use the machine better."
    return f"{said}; only a smaller backbone or fewer views make it faster here."


def describe(config: TrainingConfig) -> str:
    """The configuration in a line."""
    views = config.method.views
    crops = [f"{crops.count}x{crops.size}" for crops in (views.global_crops, views.local_crops) if crops.count]
    return (
        f"{config.method.name} on {config.backbone.name}, patches of {config.backbone.patch_size}, {' + '.join(crops)}"
    )


def _short(number: float) -> str:
    """Three digits, and all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
