"""Measure everything for `gpu_report.py`, in order, each within its own time limit: speed as by `ssl-vit bench`.

    python tools/gpu_benchmarks.py OUT.json FOLDER END [NAME ...]

FOLDER is for generated images; END is a time in seconds since 1970. The exit code is 0 when no measurement is left,
else a new process can continue.
"""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import gpu_checks
import torch
from gpu_checks import VIT_CPU, BenchContext, TrainingStepper
from torch.autograd import DeviceType

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import BenchConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.sources.synthetic import make_synthetic_photos
from ssl_vit.data.sources.torchvision_datasets import ArrayDataset
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.schedules import make_plan
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.atomic_io import write_json
from ssl_vit.runtime.device import best_device, measure_matmul
from ssl_vit.training.benchmark import BenchmarkRun
from ssl_vit.training.benchmark_report import machine
from ssl_vit.training.trainer import build_method, silence_lightning

PHOTOS = 512  # generated JPEG files
EPOCH = 2_000_000  # images, so that an epoch does not end
_MIN_SECONDS = 3.0  # with less time left, no measurement starts

COMPILED, EAGER, RECOMPUTED = "trainer.compile=true", "trainer.compile=false", "trainer.activation_checkpointing=true"
DINO = ("method.views.local_crops.count=10", "method.head.prototypes=65536")
CIFAR = (
    *("backbone=vit_tiny", "backbone.patch_size=4", "backbone.img_size=32"),
    *("method.views.local_crops.count=8", "method.views.local_crops.size=16"),
)
K65536, K4096 = "method.head.prototypes=65536", "method.head.prototypes=4096"
TINY = ("backbone=vit_cpu", "backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2")
TINY_DINO = ("method.views.local_crops.count=2", "method.views.local_crops.size=24", "method.head.prototypes=512")


class Measurement(NamedTuple):
    """A measurement with its time limit."""

    seconds: float
    measure: Callable[[BenchContext], dict[str, Any]]


def plan(context: BenchContext) -> dict[str, Measurement]:
    """Return all measurements by name, the most important first."""
    small, base, large = ("backbone=vit_small", *DINO), ("backbone=vit_base", *DINO), ("backbone=vit_large", *DINO)
    sit, cifar = ("backbone=vit_small", "method=sit"), partial(speed, row="full", photos=False)
    return {
        "machine": Measurement(60, describe_machine),
        "vit_s synthetic": Measurement(120, partial(speed, overrides=(*small, COMPILED), batches=(512, 256))),
        "vit_s full": Measurement(60, partial(speed, overrides=(*small, COMPILED), batches=(512, 256), row="full")),
        "vit_s not compiled": Measurement(40, partial(speed, overrides=(*small, EAGER), batches=(512, 256))),
        "vit_s recomputed": Measurement(
            60, partial(speed, overrides=(*small, COMPILED, RECOMPUTED), batches=(512, 256))
        ),
        "vit_s recomputed, eager": Measurement(
            40, partial(speed, overrides=(*small, EAGER, RECOMPUTED), batches=(512, 256))
        ),
        "cifar 512": Measurement(60, partial(cifar, overrides=(*CIFAR, K65536, COMPILED), batches=(512,))),
        "cifar 1024": Measurement(60, partial(cifar, overrides=(*CIFAR, K65536, COMPILED), batches=(1024,))),
        "cifar 512 not compiled": Measurement(25, partial(cifar, overrides=(*CIFAR, K65536, EAGER), batches=(512,))),
        "cifar 1024 not compiled": Measurement(25, partial(cifar, overrides=(*CIFAR, K65536, EAGER), batches=(1024,))),
        "cifar 512 K=4096": Measurement(40, partial(cifar, overrides=(*CIFAR, K4096, COMPILED), batches=(512,))),
        "cifar 1024 K=4096": Measurement(40, partial(cifar, overrides=(*CIFAR, K4096, COMPILED), batches=(1024,))),
        "cifar 512 CUDA graphs": Measurement(60, partial(graphed, overrides=(*CIFAR, K4096, COMPILED), batches=(512,))),
        "check sync": Measurement(40, gpu_checks.synchronization),
        "check waits": Measurement(30, gpu_checks.waits),
        "check graphs": Measurement(40, gpu_checks.graphs),
        "vit_b": Measurement(90, partial(speed, overrides=(*base, COMPILED), batches=(256, 128))),
        "vit_l": Measurement(90, partial(speed, overrides=(*large, COMPILED), batches=(128, 64))),
        "sit synthetic": Measurement(60, partial(speed, overrides=(*sit, COMPILED), batches=(512, 256))),
        "sit full": Measurement(45, partial(speed, overrides=(*sit, COMPILED), batches=(512, 256), row="full")),
        "parts": Measurement(40, gpu_checks.parts),
        "check dino": Measurement(60, partial(gpu_checks.agreement, method="dino")),
        "check sit": Measurement(60, partial(gpu_checks.agreement, method="sit")),
        "profile cifar": Measurement(40, partial(profile, overrides=(*CIFAR, K65536, COMPILED), batch=512)),
        "profile vit_s": Measurement(50, partial(profile, overrides=(*small, COMPILED), batch=256)),
    }  # fmt: skip


def main(out: str, folder: str, end: str, *only: str) -> int:
    """Measure what is not in the file yet; return 1 if a new process has to continue."""
    silence_lightning()
    path, context = Path(out), BenchContext(best_device(), Path(folder))
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, measurement in plan(context).items():
        left = float(end) - time.time()
        if name in found or left < (_MIN_SECONDS if context.on_gpu else 0) or not name.startswith(only or ("",)):
            continue
        found[name] = {"error": "the process died"}  # replaced if it does not
        write_json(path, found)
        context.peak = found["machine"].get("matmul_flops") if "machine" in found else None
        begin = time.monotonic()
        found[name] = run_measurement(measurement, context, min(measurement.seconds, left))
        found[name]["took_s"] = round(time.monotonic() - begin, 1)
        write_json(path, found)
        print(f"{name}: {summary(found[name])}", flush=True)
        if "CUDA error" in found[name].get("error", ""):
            return 1  # the CUDA context is unusable
    return 0


def run_measurement(measurement: Measurement, context: BenchContext, seconds: float) -> dict[str, Any]:
    """Return the values measured, or the error."""
    try:
        torch._dynamo.reset()  # its cache holds at most eight graphs per block
        with time_limit(seconds):
            return measurement.measure(context)
    except Exception:
        return {"error": "".join(traceback.format_exc(limit=-6))[-4000:]}
    finally:
        gc.collect()
        if context.on_gpu:
            torch.cuda.empty_cache()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after this time."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def describe_machine(context: BenchContext) -> dict[str, Any]:
    """Return the machine and the speed of a matrix product in bf16."""
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    flops = measure_matmul(context.device.type, "bf16-mixed", seconds=2.0 if context.on_gpu else 0.1)
    found = {"matmul_flops": flops, **machine(context.device)}
    if context.on_gpu:
        found["driver"] = subprocess.run(driver, capture_output=True, text=True).stdout.strip()
        found["cuda"] = torch.version.cuda
        found["shared_memory_gb"] = shutil.disk_usage("/dev/shm").total / 1e9  # for batches of loaders
    return found


def speed(
    context: BenchContext,
    *,
    overrides: tuple[str, ...],
    batches: tuple[int, ...],
    row: str = "synthetic",
    photos: bool = True,
) -> dict[str, Any]:
    """Measure a row of `bench` with the largest batch that fits into memory."""
    for size in batches:
        try:
            return _speed(context, overrides, size, row, photos)
        except torch.cuda.OutOfMemoryError:
            if size == batches[-1]:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    raise AssertionError


def _speed(context: BenchContext, overrides: tuple[str, ...], size: int, row: str, photos: bool) -> dict[str, Any]:
    config = load_config(
        "bench", [*adapt_to_device(context, overrides), f"data.batch_size={size if context.on_gpu else 8}"], BenchConfig
    )
    dataset = generated_photos(context) if photos else small_images(context)
    if photos:  # read from disk, although they would fit into memory
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache_gb": 0.0})})
    skipped = SkippedImageLog(context.folder / "skipped_images.txt")
    benchmark = BenchmarkRun(config, dataset, skipped, seconds=6.0 if context.on_gpu else 0.1)
    with torch.device("meta"):  # sizes are sufficient
        method = build_method(config, make_plan(config, len(dataset)))
    flops = method.count_flops().total
    measured = benchmark.row(row)
    step = sum(measured.phases.values())
    return {
        "images_per_s": measured.images_per_s,
        "batch": config.data.batch_size,
        "steps": measured.steps,
        "parts_ms": {part: 1000 * seconds for part, seconds in measured.phases.items()},
        "shares": {part: seconds / step for part, seconds in measured.phases.items()},
        "gflop_per_image": flops / 1e9,
        "peak_share": measured.images_per_s * flops / context.peak if context.peak else None,
        "memory": measured.memory,
        "overrides": list(overrides),
    }


def graphed(context: BenchContext, *, overrides: tuple[str, ...], batches: tuple[int, ...]) -> dict[str, Any]:
    """Measure `speed` with CUDA graphs of the blocks' kernels, an experiment that training has no option for."""
    context.needs_gpu()
    step = SSLMethod.training_step

    def compile_blocks(self: Backbone) -> None:
        for block in self.vit.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, mode="reduce-overhead")
        self.compiled = True

    def training_step(self: SSLMethod, *arguments: Any) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step(self, *arguments)

    with (
        patch.object(Backbone, "compile_blocks", compile_blocks),
        patch.object(SSLMethod, "training_step", training_step),
    ):
        return speed(context, overrides=overrides, batches=batches, row="full", photos=False)


def profile(context: BenchContext, *, overrides: tuple[str, ...], batch: int) -> dict[str, Any]:
    """Return the slowest kernels of two steps, and whether the CPU launches work faster than the GPU does it."""
    if not context.on_gpu:
        overrides, batch = (*VIT_CPU, "backbone.depth=1", "trainer.compile=false"), 2
    stepper = TrainingStepper(overrides, batch=batch, device=context.device)
    for _ in range(3 if context.on_gpu else 1):
        stepper.step()
    context.wait()
    start = time.perf_counter()
    stepper.step()
    launched = time.perf_counter() - start
    context.wait()
    whole = time.perf_counter() - start
    with torch.profiler.profile() as recorded:
        stepper.step()
        stepper.step()
        context.wait()
    averages = recorded.key_averages()
    kernels = [each for each in averages if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    by = "self_device_time_total" if context.on_gpu else "self_cpu_time_total"
    table = averages.table(sort_by=by, row_limit=40, max_name_column_width=80)
    return {
        "launch ms": 1000 * launched,  # if far below the step's, CUDA graphs gain nothing
        "step ms": 1000 * whole,
        "kernels ms": sum(each.self_device_time_total for each in kernels) / 2000,
        "kernels": sum(each.count for each in kernels) // 2,
        "table": table,
    }


def adapt_to_device(context: BenchContext, overrides: tuple[str, ...]) -> list[str]:
    """Return the overrides, or on a CPU those of a tiny run."""
    if context.on_gpu:
        return list(overrides)
    sit = "method=sit" in overrides
    kept = [o for o in overrides if o.startswith(("method=", "trainer.activation_checkpointing"))]
    return [*kept, *TINY, *(() if sit else TINY_DINO), "data.num_workers=0", EAGER]


def generated_photos(context: BenchContext) -> ImageDataset:
    """Return JPEG files of the size of photos, repeated so that an epoch is long."""
    folder, count = context.folder / "photos", PHOTOS if context.on_gpu else 8
    if not folder.is_dir():
        folder.mkdir()
        make_synthetic_photos(folder, num_images=count, seed=0)
    return Subset(build_dataset("folder", folder), torch.arange(count).repeat(EPOCH // count))


def small_images(context: BenchContext) -> ImageDataset:
    """Return noise of the size of CIFAR-10's training set, in memory."""
    count, side = (50_000, 32) if context.on_gpu else (64, 48)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return ArrayDataset(images, torch.full((count,), -1), [], title="noise")


def summary(values: dict[str, Any]) -> str:
    """Return a measurement as one line."""
    if "error" in values:
        return f"failed after {values['took_s']} s: {values['error'].strip().splitlines()[-1]}"
    speed = f"{values['images_per_s']:,.0f} images/s, " if "images_per_s" in values else ""
    return f"{speed}took {values['took_s']} s"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
