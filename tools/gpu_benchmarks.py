"""The figures of `gpu_report.py`, in their order, each in its own time: speed by `ssl-vit bench`'s rows.

    python tools/gpu_benchmarks.py OUT.json FOLDER END [NAME ...]

FOLDER takes the images that are made; END is a time in seconds since 1970. The exit code is 0 when no figure is left,
else a new process may go on.
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
from gpu_checks import VIT_CPU, Place, Stepper
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

PHOTOS = 512  # JPEG files that are made
EPOCH = 2_000_000  # images, so that an epoch does not end
_LEAST = 3.0  # seconds below which no figure is begun

COMPILED, EAGER, RECOMPUTED = "trainer.compile=true", "trainer.compile=false", "trainer.activation_checkpointing=true"
DINO = ("method.views.local_crops.count=10", "method.head.prototypes=65536")
CIFAR = (
    *("backbone=vit_tiny", "backbone.patch_size=4", "backbone.img_size=32"),
    *("method.views.local_crops.count=8", "method.views.local_crops.size=16"),
)
K65536, K4096 = "method.head.prototypes=65536", "method.head.prototypes=4096"
TINY = ("backbone=vit_cpu", "backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2")
TINY_DINO = ("method.views.local_crops.count=2", "method.views.local_crops.size=24", "method.head.prototypes=512")


class Figure(NamedTuple):
    """Something to measure."""

    seconds: float  # that it may take
    measure: Callable[[Place], dict[str, Any]]


def plan(place: Place) -> dict[str, Figure]:
    """All figures by name, the most important first."""
    small, base, large = ("backbone=vit_small", *DINO), ("backbone=vit_base", *DINO), ("backbone=vit_large", *DINO)
    sit, cifar = ("backbone=vit_small", "method=sit"), partial(speed, row="full", photos=False)
    return {
        "machine": Figure(60, about),
        "vit_s synthetic": Figure(120, partial(speed, words=(*small, COMPILED), batches=(512, 256))),
        "vit_s full": Figure(60, partial(speed, words=(*small, COMPILED), batches=(512, 256), row="full")),
        "vit_s not compiled": Figure(40, partial(speed, words=(*small, EAGER), batches=(512, 256))),
        "vit_s recomputed": Figure(60, partial(speed, words=(*small, COMPILED, RECOMPUTED), batches=(512, 256))),
        "vit_s recomputed, eager": Figure(40, partial(speed, words=(*small, EAGER, RECOMPUTED), batches=(512, 256))),
        "cifar 512": Figure(60, partial(cifar, words=(*CIFAR, K65536, COMPILED), batches=(512,))),
        "cifar 1024": Figure(60, partial(cifar, words=(*CIFAR, K65536, COMPILED), batches=(1024,))),
        "cifar 512 not compiled": Figure(25, partial(cifar, words=(*CIFAR, K65536, EAGER), batches=(512,))),
        "cifar 1024 not compiled": Figure(25, partial(cifar, words=(*CIFAR, K65536, EAGER), batches=(1024,))),
        "cifar 512 K=4096": Figure(40, partial(cifar, words=(*CIFAR, K4096, COMPILED), batches=(512,))),
        "cifar 1024 K=4096": Figure(40, partial(cifar, words=(*CIFAR, K4096, COMPILED), batches=(1024,))),
        "cifar 512 CUDA graphs": Figure(60, partial(graphed, words=(*CIFAR, K4096, COMPILED), batches=(512,))),
        "check sync": Figure(40, gpu_checks.synchronization),
        "check waits": Figure(30, gpu_checks.waits),
        "check graphs": Figure(40, gpu_checks.graphs),
        "vit_b": Figure(90, partial(speed, words=(*base, COMPILED), batches=(256, 128))),
        "vit_l": Figure(90, partial(speed, words=(*large, COMPILED), batches=(128, 64))),
        "sit synthetic": Figure(60, partial(speed, words=(*sit, COMPILED), batches=(512, 256))),
        "sit full": Figure(45, partial(speed, words=(*sit, COMPILED), batches=(512, 256), row="full")),
        "parts": Figure(40, gpu_checks.parts),
        "check dino": Figure(60, partial(gpu_checks.agreement, method="dino")),
        "check sit": Figure(60, partial(gpu_checks.agreement, method="sit")),
        "profile cifar": Figure(40, partial(profile, words=(*CIFAR, K65536, COMPILED), batch=512)),
        "profile vit_s": Figure(50, partial(profile, words=(*small, COMPILED), batch=256)),
    }  # fmt: skip


def main(out: str, folder: str, end: str, *only: str) -> int:
    """Measure what the file does not hold yet; 1 if a new process has to go on."""
    silence_lightning()
    path, place = Path(out), Place(best_device(), Path(folder))
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, figure in plan(place).items():
        left = float(end) - time.time()
        if name in found or left < (_LEAST if place.on_gpu else 0) or not name.startswith(only or ("",)):
            continue
        found[name] = {"error": "the process died"}  # should it
        write_json(path, found)
        place.peak = found["machine"].get("matmul_flops") if "machine" in found else None
        begin = time.monotonic()
        found[name] = tried(figure, place, min(figure.seconds, left))
        found[name]["took_s"] = round(time.monotonic() - begin, 1)
        write_json(path, found)
        print(f"{name}: {short(found[name])}", flush=True)
        if "CUDA error" in found[name].get("error", ""):
            return 1  # nothing works in this process any more
    return 0


def tried(figure: Figure, place: Place, seconds: float) -> dict[str, Any]:
    """What was measured, or the error."""
    try:
        torch._dynamo.reset()  # at most eight graphs of a block's code are kept
        with within(seconds):
            return figure.measure(place)
    except Exception:
        return {"error": "".join(traceback.format_exc(limit=-6))[-4000:]}
    finally:
        gc.collect()
        if place.on_gpu:
            torch.cuda.empty_cache()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when it takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def about(place: Place) -> dict[str, Any]:
    """The machine, and its speed at a matrix product in bf16."""
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    flops = measure_matmul(place.device.type, "bf16-mixed", seconds=2.0 if place.on_gpu else 0.1)
    found = {"matmul_flops": flops, **machine(place.device)}
    if place.on_gpu:
        found["driver"] = subprocess.run(driver, capture_output=True, text=True).stdout.strip()
        found["cuda"] = torch.version.cuda
        found["shared_memory_gb"] = shutil.disk_usage("/dev/shm").total / 1e9  # that batches come through
    return found


def speed(
    place: Place, *, words: tuple[str, ...], batches: tuple[int, ...], row: str = "synthetic", photos: bool = True
) -> dict[str, Any]:
    """A row of `bench` with the largest of the batches that fits into memory."""
    for size in batches:
        try:
            return _speed(place, words, size, row, photos)
        except torch.cuda.OutOfMemoryError:
            if size == batches[-1]:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    raise AssertionError


def _speed(place: Place, words: tuple[str, ...], size: int, row: str, photos: bool) -> dict[str, Any]:
    config = load_config(
        "bench", [*adapted(place, words), f"data.batch_size={size if place.on_gpu else 8}"], BenchConfig
    )
    dataset = photographs(place) if photos else small_images(place)
    if photos:  # from disk, although they are few
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache_gb": 0.0})})
    skipped = SkippedImageLog(place.folder / "skipped_images.txt")
    subject = BenchmarkRun(config, dataset, skipped, seconds=6.0 if place.on_gpu else 0.1)
    with torch.device("meta"):  # its size is enough
        flops = build_method(config, make_plan(config, len(dataset))).count_flops().total
    measured = subject.row(row)
    step = sum(measured.parts.values())
    return {
        "images_per_s": measured.images_per_s,
        "batch": config.data.batch_size,
        "steps": measured.steps,
        "parts_ms": {part: 1000 * seconds for part, seconds in measured.parts.items()},
        "shares": {part: seconds / step for part, seconds in measured.parts.items()},
        "gflop_per_image": flops / 1e9,
        "peak_share": measured.images_per_s * flops / place.peak if place.peak else None,
        "memory": measured.memory,
        "words": list(words),
    }


def graphed(place: Place, *, words: tuple[str, ...], batches: tuple[int, ...]) -> dict[str, Any]:
    """`speed` with the blocks' kernels in CUDA graphs, as an experiment: training has no such option."""
    place.needs_gpu()
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
        return speed(place, words=words, batches=batches, row="full", photos=False)


def profile(place: Place, *, words: tuple[str, ...], batch: int) -> dict[str, Any]:
    """The costliest kernels of two steps, and whether the CPU gives work faster than the GPU does it."""
    if not place.on_gpu:
        words, batch = (*VIT_CPU, "backbone.depth=1", "trainer.compile=false"), 2
    stepper = Stepper(words, batch=batch, device=place.device)
    for _ in range(3 if place.on_gpu else 1):
        stepper.step()
    place.wait()
    start = time.perf_counter()
    stepper.step()
    launched = time.perf_counter() - start
    place.wait()
    whole = time.perf_counter() - start
    with torch.profiler.profile() as recorded:
        stepper.step()
        stepper.step()
        place.wait()
    averages = recorded.key_averages()
    kernels = [each for each in averages if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    by = "self_device_time_total" if place.on_gpu else "self_cpu_time_total"
    table = averages.table(sort_by=by, row_limit=40, max_name_column_width=80)
    return {
        "launch ms": 1000 * launched,  # if it is far below the step's, CUDA graphs have nothing to gain
        "step ms": 1000 * whole,
        "kernels ms": sum(each.self_device_time_total for each in kernels) / 2000,
        "kernels": sum(each.count for each in kernels) // 2,
        "table": table,
    }


def adapted(place: Place, words: tuple[str, ...]) -> list[str]:
    """The words, or on a CPU those that make everything tiny."""
    if place.on_gpu:
        return list(words)
    sit = "method=sit" in words
    kept = [word for word in words if word.startswith(("method=", "trainer.recompute"))]
    return [*kept, *TINY, *(() if sit else TINY_DINO), "data.num_workers=0", EAGER]


def photographs(place: Place) -> ImageDataset:
    """JPEG files of photographs' size, so often that an epoch is long."""
    folder, count = place.folder / "photos", PHOTOS if place.on_gpu else 8
    if not folder.is_dir():
        folder.mkdir()
        make_synthetic_photos(folder, num_images=count, seed=0)
    return Subset(build_dataset("folder", folder), torch.arange(count).repeat(EPOCH // count))


def small_images(place: Place) -> ImageDataset:
    """As many images as CIFAR-10 has for training, of its size, in memory."""
    count, side = (50_000, 32) if place.on_gpu else (64, 48)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return ArrayDataset(images, torch.full((count,), -1), [], title="noise")


def short(figure: dict[str, Any]) -> str:
    """A figure in a line, for who watches."""
    if "error" in figure:
        return f"failed after {figure['took_s']} s: {figure['error'].strip().splitlines()[-1]}"
    speed = f"{figure['images_per_s']:,.0f} images/s, " if "images_per_s" in figure else ""
    return f"{speed}took {figure['took_s']} s"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
