"""Report of a benchmark: text for the terminal and values for the JSON file."""

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
from ssl_vit.runtime.text import format_table
from ssl_vit.runtime.workers import available_cpus
from ssl_vit.training.benchmark import Model, Row

SCHEMA = 1  # of the file
WAITING = 0.1  # share of a step from which data are the bottleneck
SLOWED = 0.8  # share of the speed without data below which loading slows down the step
BUSY = 0.4  # share of the matmul peak from which the machine is well used

ROWS = {"data": "data only", "synthetic": "synthetic", "full": "full"}
_REMEDIES = {
    "augmentation": "fewer views, a smaller share of blurred ones (method.views.blur.p) and no hue shift "
    "(method.views.jitter.hue=0) make it cheaper",
    "corruption": "fewer and larger blocks (method.corruption) make it cheaper",
    "loss": "fewer prototypes (method.head.prototypes) or a smaller embedding make it cheaper",
    "clip": "a larger data.batch_size spreads it over more images",
    "optimizer": "a larger data.batch_size spreads it over more images",
    "ema": "a larger data.batch_size spreads it over more images",
    "other": "a larger data.batch_size or trainer.log_every_n_steps spreads it over more images",
}


class BenchmarkResult(NamedTuple):
    """Measurements of a configuration."""

    config: TrainingConfig  # as measured, possibly with a smaller batch size than requested
    model: Model
    peak: float  # FLOP/s of a matrix product at the model's precision
    rows: dict[str, list[Row]]  # by name, one per round

    def images_per_s(self, row: str) -> float:
        """Return the median of the rounds."""
        return median(each.images_per_s for each in self.rows[row])

    def peak_share(self, row: str) -> float:
        """Return the share of the matmul peak."""
        return self.images_per_s(row) * self.model.flops.total / self.peak


class Comparison(NamedTuple):
    """Speed of the second configuration relative to the first."""

    row: str
    overrides: list[str]  # of the second
    batch_sizes: list[int]  # of both measurements
    ratios: list[float]  # of images/s, per round

    def __str__(self) -> str:
        sizes = " and ".join(map(str, self.batch_sizes))
        return (
            f"B / A = {median(self.ratios):.2f} in images/s of the {ROWS[self.row]} row, the median of "
            f"{len(self.ratios)} rounds (from {min(self.ratios):.2f} to {max(self.ratios):.2f}); "
            f"B is A with {' '.join(self.overrides)}; measured with batches of {sizes}"
        )


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the results depend on besides the configuration; to be called before the measurements."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), flags=re.M) if info.exists() else []
    return {
        "ssl_vit": __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": names[0] if names else platform.processor(),
        "cores": available_cpus(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if sys.platform != "win32" else None,  # runnable processes in the last minute
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
    }


def to_json(
    results: list[BenchmarkResult], comparison: Comparison | None, images: list[str], environment: dict[str, Any]
) -> dict[str, Any]:
    """Return everything as JSON values, in seconds, GB, FLOP and FLOP/s."""
    return {
        "schema": SCHEMA,
        "environment": environment,
        "measured": [
            {
                "images": description,
                "batch_size": result.config.data.batch_size,
                "precision": result.model.precision,
                "flops_per_image": result.model.flops.parts() | {"total": result.model.flops.total},
                "matmul_peak": result.peak,
                "rows": {
                    name: {
                        "images_per_s": result.images_per_s(name),
                        "flops": result.images_per_s(name) * result.model.flops.total if name != "data" else None,
                        "peak_share": result.peak_share(name) if name != "data" else None,
                        "rounds": [row._asdict() for row in rounds],
                    }
                    for name, rounds in result.rows.items()
                },
                "config": result.config.model_dump(mode="json"),
            }
            for result, description in zip(results, images, strict=True)
        ],
        "comparison": comparison and comparison._asdict() | {"ratio": median(comparison.ratios)},
    }


def format_result(result: BenchmarkResult) -> str:
    """Return tables of the measurements and of the phases of a step, with operations, matmul peak and memory."""
    flops = result.model.flops
    table: list[list[str]] = []
    for name, rounds in result.rows.items():
        speed = result.images_per_s(name)
        rates = ["", ""] if name == "data" else [f"{speed * flops.total / 1e12:.3g}", f"{result.peak_share(name):.0%}"]
        table.append([ROWS[name], _short(speed), *rates, f"{sum(row.steps for row in rounds):,}"])
    name, rounds = list(result.rows.items())[-1]
    phases = {phase: median(row.phases[phase] for row in rounds) for phase in rounds[0].phases}
    step = sum(phases.values())
    shares = [[phase, f"{1000 * seconds:,.1f}", f"{seconds / step:.1%}"] for phase, seconds in phases.items()]
    memory = {name: max(row.memory[name] for row in rounds) for name in rounds[0].memory}
    titles = {"host_gb": "host (without worker processes)", "device_gb": "device"}
    lines = [
        format_table(table, ["", "images/s", "TFLOP/s", "of peak", "steps"]),
        "",
        format_table(shares, [f"a step, {ROWS[name]}", "ms", "share"]),
        "",
        f"{_short(flops.total / 1e9)} GFLOP per image: "
        + ", ".join(f"{name} {_short(part / 1e9)}" for name, part in flops.parts().items()),
        f"matmul peak {result.peak / 1e12:.3g} TFLOP/s in {result.model.precision.removesuffix('-mixed')}",
        "peak memory: " + ", ".join(f"{gb:.2f} GB {titles[name]}" for name, gb in memory.items()),
    ]
    return "\n".join(lines)


def bottleneck(result: BenchmarkResult, device: torch.device) -> str:
    """Return what limits the full training, in one sentence, and what to change."""
    phases = result.rows["full"][-1].phases
    step = sum(phases.values())
    waiting = phases["data"] / step
    loader, training = result.images_per_s("data"), result.images_per_s("synthetic")
    speed = result.images_per_s("full") / training
    phase = max(phases, key=phases.__getitem__)
    if phase == "data" or (waiting > WAITING and (loader < training or speed < SLOWED)):
        return (
            f"Bottleneck: data, {waiting:.0%} of a step: the loader alone reaches {_short(loader)} images/s, training "
            f"alone {_short(training)}"
            + (", and the two share the cores" if loader > training else "")
            + "; use more cores, smaller files, or a data.cache_gb that holds all images."
        )
    duration = f"{_short(1000 * phases[phase])} of {_short(1000 * step)} ms"
    text = f"Bottleneck: {phase}, {phases[phase] / step:.0%} of a step ({duration})"
    if speed < SLOWED:
        text += f", which loading slows down to {speed:.0%} of its speed without"
    if phase in _REMEDIES:
        return f"{text}; {_REMEDIES[phase]}."
    share = result.peak_share("full")
    text = f"{text}, with the whole step at {share:.0%} of the matmul peak"
    if result.model.precision == "32-true" and autocast_dtype(device):
        return f"{text}; this machine computes faster with trainer.precision=bf16-mixed."
    if share < BUSY:
        return f"{text}; a larger data.batch_size may use the machine better."
    return f"{text}; only a smaller backbone or fewer views make it faster here."


def describe(config: TrainingConfig) -> str:
    """Return the configuration in one line."""
    views = config.method.views
    crops = [f"{crops.count}x{crops.size}" for crops in (views.global_crops, views.local_crops) if crops.count]
    return (
        f"{config.method.name} on {config.backbone.name}, patches of {config.backbone.patch_size}, {' + '.join(crops)}"
    )


def _short(number: float) -> str:
    """Format a number with three digits, or as an integer."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
