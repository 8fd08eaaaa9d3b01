"""Time the parts of a training step alone on a GPU, and compare its results with the CPU's, for `gpu_report.py`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import BenchConfig
from ssl_vit.data.transforms.corruption import Corruption
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.evaluation.classification.knn import LabeledFeatures, knn
from ssl_vit.losses.dino import TeacherTargets, assignment_stats, dino_loss
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.gradient_clipping import clip_grad_per_parameter
from ssl_vit.methods.heads import Prototypes
from ssl_vit.methods.schedules import make_plan
from ssl_vit.models.drop_path import sample_drop_paths
from ssl_vit.models.ema import update_ema
from ssl_vit.models.feature_statistics import effective_rank, feature_std
from ssl_vit.runtime.distributed import norms
from ssl_vit.runtime.rng import view_keys
from ssl_vit.training.benchmark import make_batch
from ssl_vit.training.trainer import build_method

STEP, STEPS = 5_000, 10_000  # current step and length of the run
DROP_PATH = "backbone.drop_path=0.1"
VIT_CPU = ("backbone=vit_cpu", "method.views.local_crops.size=24")
SIT = ("backbone=vit_cpu", "method=sit")
_SLEEP_CYCLES = 10**9  # of the GPU: about half a second


class BenchContext:
    """Device and folder of the measurements.

    Args:
        device: Device to measure.
        folder: For generated images.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device = device
        self.folder = folder
        self.peak: float | None = None  # FLOP/s of a matrix product, once measured

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def needs_gpu(self) -> None:
        """Raise RuntimeError without a GPU."""
        if not self.on_gpu:
            raise RuntimeError("needs a GPU")

    def wait(self) -> None:
        """Wait until the GPU has finished its queued work."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the seconds of a call: the median of ten after two warm-up calls."""
        seconds = []
        for _ in range(12 if self.on_gpu else 3):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return median(seconds[2:])


class TrainingStepper:
    """Training steps of a method on one batch of noise without a Trainer, as in the middle of a run.

    Args:
        overrides: Overrides of `bench`.
        batch: Number of images.
        device: Device to train on.
        mixed: Whether to use bf16 autocast.
    """

    def __init__(self, overrides: tuple[str, ...], *, batch: int, device: torch.device, mixed: bool = True) -> None:
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        overrides = (*overrides, f"data.batch_size={batch}", f"trainer.accelerator={accelerator}")
        self.config = load_config("bench", list(overrides), BenchConfig)
        plan = make_plan(self.config, 100 * batch)._replace(total_steps=STEPS)
        self.method = build_method(self.config, plan).to(device).train()
        self.method._trainer = SimpleNamespace(precision_plugin=None)  # type: ignore[assignment]
        self.method.timer.start(device)
        self.optimizer = self.method.configure_optimizers()
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3
        self.batch = make_batch(self.config, batch, device)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=mixed)

    def step(self) -> Tensor:
        """Do all that training does in a step, and return the loss ()."""
        with patch.multiple(SSLMethod, global_step=STEP, should_log=False):
            with self.autocast():
                loss = self.method.training_step(self.batch, 0)
            loss.backward()
            self.method.on_before_optimizer_step(self.optimizer)
            self.method.configure_gradient_clipping(self.optimizer)
            self.optimizer.step()
            self.method.after_optimizer_step(STEP, self.method.check.applied)
            self.optimizer.zero_grad()
        return loss.detach()


def synchronization(context: BenchContext) -> dict[str, Any]:
    """Find operations of a step that torch reports as waiting for the GPU."""
    context.needs_gpu()
    found = {}
    for name, overrides in (("dino", VIT_CPU), ("sit", SIT)):
        stepper = TrainingStepper((*overrides, DROP_PATH, "trainer.compile=false"), batch=64, device=context.device)
        stepper.step()
        with warnings.catch_warnings(record=True) as caught, synchronizing("warn"):
            warnings.simplefilter("always")
            stepper.step()
        locations = {
            f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)
        }
        try:
            with synchronizing("error"):
                stepper.step()
            found[name] = "none" if not locations else f"WAITS at {sorted(locations)}"
        except RuntimeError as error:
            found[name] = f"WAITS at {sorted(locations)}: {error}"
    return found


@contextmanager
def synchronizing(mode: str) -> Iterator[None]:
    """Set torch's reaction to synchronizing operations within the block: warn or error."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(context: BenchContext) -> dict[str, Any]:
    """Find parts of a step that block the CPU: their calls return only after a sleeping GPU wakes up.

    torch does not report all waits: a large copy from pageable memory may block in the driver.
    """
    context.needs_gpu()
    found = {}
    for name, call in calls(context, batch=512).items():
        call()
        call()
        context.wait()
        start = time.perf_counter()
        torch.cuda._sleep(_SLEEP_CYCLES)
        call()
        host = time.perf_counter() - start
        context.wait()
        whole = time.perf_counter() - start
        found[name] = f"{'WAITS' if host > 0.8 * whole else 'no'} ({1000 * host:.1f} of {1000 * whole:.1f} ms)"
    return found


def parts(context: BenchContext) -> dict[str, Any]:
    """Return the milliseconds of parts of a step alone, per batch, and of the augmentations per image."""
    batch = 512 if context.on_gpu else 4
    found = {f"{name}, ms": 1000 * context.seconds(call) for name, call in calls(context, batch=batch).items()}
    found |= {
        f"{name}, ms per image": found[f"{name}, ms"] / batch
        for name in ("colors, global", "colors, local", "corruption")
    }
    found |= {f"loss K={k}, ms": 1000 * context.seconds(loss_call(context, batch, k)) for k in (4096, 65536)}
    queries, index_size = (10_000, 50_000) if context.on_gpu else (50, 500)
    train, test = (
        LabeledFeatures(
            F.normalize(torch.randn(n, 384, device=context.device)), torch.arange(n, device=context.device) % 10
        )
        for n in (index_size, queries)
    )
    search = partial(knn, train, test, ks=[10, 20, 100, 200], temperature=0.07)
    return {**found, f"kNN {queries:,} x {index_size:,} x 384, s": context.seconds(search)}


def calls(context: BenchContext, *, batch: int) -> dict[str, Callable[[], object]]:
    """Return parts of steps of ViT-S, 2x224 + 10x96 (SiT: 2x224), and crops of CIFAR; on a CPU, of a tiny ViT."""
    if context.on_gpu:
        overrides: tuple[str, ...] = ("backbone=vit_small", "method.views.local_crops.count=10")
        prototypes = 65536
    else:
        overrides, prototypes = ("backbone=vit_cpu", "method.views.local_crops.size=24"), 256
    stepper = TrainingStepper((*overrides, "trainer.compile=false"), batch=1, device=context.device)
    stepper.step()
    method, batch_data = stepper.method, make_batch(stepper.config, batch, context.device)
    views = stepper.config.method.views
    size, width = views.global_crops.size, method.eval_backbone.embed_dim
    keys = view_keys(batch_data.key, 0, 2 + views.local_crops.count)  # (B, V)
    sit = load_config("bench", ["method=sit"], BenchConfig).method
    corruption, clean = Corruption(sit.corruption), torch.randn(batch, 3, size, size, device=context.device)
    for parameter in method.student.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    gradients = [parameter.grad for parameter in method.student.parameters() if parameter.grad is not None]
    features, z = (torch.randn(n, d, device=context.device) for n, d in ((batch, width), (2 * batch, 256)))
    last = Prototypes(256, prototypes, norm_last_layer=True).to(context.device)
    targets = TeacherTargets(last(z), torch.zeros(prototypes, device=context.device), 0.04)
    cifar = MultiCrop(load_config("bench", [*VIT_CPU, "backbone.img_size=32"], BenchConfig).method.views)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=context.device)
    applied = torch.tensor(True, device=context.device)

    def corrupt() -> None:
        for view in (0, 1):
            corruption(clean, keys[:, view], view=view)

    return {
        "colors, global": lambda: method.color_augmentation(batch_data.global_views, batch_data.key),
        "colors, local": lambda: method.color_augmentation(batch_data.local_views, batch_data.key, first_view=2),
        "corruption": torch.no_grad()(corrupt),
        "crops of CIFAR": lambda: cifar.crop_batch(images, batch_data.key),
        "drop path": lambda: sample_drop_paths(
            method.student.backbone.drop_paths, keys[:, 2:].T.flatten(), context.device
        ),
        "clip": lambda: clip_grad_per_parameter(gradients, norms(gradients), 3.0),
        "ema": lambda: update_ema(method.teacher, method.student, 0.996, applied),
        "optimizer": stepper.optimizer.step,
        "logged: rank and feature std": lambda: (effective_rank(features), feature_std(features)),
        "logged: assignment": lambda: assignment_stats(targets),
    }


def loss_call(context: BenchContext, batch: int, prototypes: int) -> Callable[[], None]:
    """Return a call of the DINO loss of 2 + 10 views, forward and backward, with the prototypes' weight gradient."""
    last = Prototypes(256, prototypes, norm_last_layer=True).to(context.device)
    student, teacher = (F.normalize(torch.randn(views * batch, 256, device=context.device)) for views in (12, 2))
    student.requires_grad_()
    center = torch.zeros(prototypes, device=context.device)

    def call() -> None:
        with torch.autocast(context.device.type, torch.bfloat16):
            with torch.no_grad():
                targets = TeacherTargets(last(teacher), center, 0.04)
            dino_loss(last(student), targets, views=12, temperature=0.1).backward()
        last.zero_grad()

    return call


def graphs(context: BenchContext) -> dict[str, Any]:
    """Count compiled graphs of the blocks in three steps, graph breaks, and parameters that torch.compile renamed."""
    counts: dict[str, Any] = {}
    real = torch.compile
    with patch("torch.compile", real if context.on_gpu else partial(real, backend="eager")):
        for name, overrides, expected in (("dino", VIT_CPU, 5), ("sit", SIT, 2)):
            torch._dynamo.reset()
            counters.clear()
            overrides = (*overrides, DROP_PATH, "trainer.compile=true", "trainer.fused_attention=true")
            stepper = TrainingStepper(overrides, batch=4, device=context.device)
            for _ in range(3):
                stepper.step()
            count = counters["stats"]["unique_graphs"]
            counts[f"{name} graphs"] = f"{count} {'as expected' if count == expected else f'INSTEAD OF {expected}'}"
            counts[f"{name} breaks"] = sum(counters["graph_break"].values())
            renamed = [key for key in stepper.method.state_dict() if "_orig_mod" in key]
            counts[f"{name} renamed keys"] = len(renamed)
    return counts


def agreement(context: BenchContext, *, method: str) -> dict[str, Any]:
    """Compare the losses of five float32 steps on the GPU with the CPU's, from the same seed."""
    overrides = (*(SIT if method == "sit" else VIT_CPU), DROP_PATH)
    devices = {"cpu": torch.device("cpu"), "device": context.device}
    if context.on_gpu:
        devices["compiled"] = context.device
    losses = {}
    for name, device in devices.items():
        compiled = f"trainer.compile={str(name == 'compiled').lower()}"
        stepper = TrainingStepper((*overrides, compiled), batch=8, device=device, mixed=False)
        losses[name] = [float(stepper.step()) for _ in range(5)]
    differences = {
        f"largest difference, {name}": max(abs(a - b) for a, b in zip(own, losses["cpu"], strict=True))
        for name, own in losses.items()
        if name != "cpu"
    }
    return {**differences, **losses}
