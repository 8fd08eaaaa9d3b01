"""Parts of a step alone on a GPU, and whether the GPU computes what the CPU does, for `gpu_report.py`."""

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

STEP, STEPS = 5_000, 10_000  # of a run: the one at hand, and all
DROP_PATH = "backbone.drop_path=0.1"
VIT_CPU = ("backbone=vit_cpu", "method.views.local_crops.size=24")
SIT = ("backbone=vit_cpu", "method=sit")
_ASLEEP = 10**9  # cycles that the GPU does nothing: about half a second


class Place:
    """Where figures are measured.

    Args:
        device: That trains.
        folder: Takes the images that are made.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device = device
        self.folder = folder
        self.peak: float | None = None  # FLOP/s of a matrix product, once it is known

    @property
    def on_gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"

    def needs_gpu(self) -> None:
        """Raise RuntimeError if there is none."""
        if not self.on_gpu:
            raise RuntimeError("needs a GPU")

    def wait(self) -> None:
        """Until a GPU has done all that it was asked to."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """What a call takes, the median of ten; the first two are left out."""
        taken = []
        for _ in range(12 if self.on_gpu else 3):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - start)
        return median(taken[2:])


class Stepper:
    """A method that takes steps on one batch of noise without a Trainer, somewhere in the middle of a run.

    Args:
        words: Of the configuration.
        batch: Images.
        device: That trains.
        mixed: Under bf16 autocast.
    """

    def __init__(self, words: tuple[str, ...], *, batch: int, device: torch.device, mixed: bool = True) -> None:
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        words = (*words, f"data.batch_size={batch}", f"trainer.accelerator={accelerator}")
        self.config = load_config("bench", list(words), BenchConfig)
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
        """Take one, all that training does; the loss ()."""
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


def synchronization(place: Place) -> dict[str, Any]:
    """Where in a step the CPU waits for the GPU by an operation that torch knows to wait."""
    place.needs_gpu()
    found = {}
    for name, words in (("dino", VIT_CPU), ("sit", SIT)):
        stepper = Stepper((*words, DROP_PATH, "trainer.compile=false"), batch=64, device=place.device)
        stepper.step()
        with warnings.catch_warnings(record=True) as caught, synchronizing("warn"):
            warnings.simplefilter("always")
            stepper.step()
        places = {f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)}
        try:
            with synchronizing("error"):
                stepper.step()
            found[name] = "none" if not places else f"WAITS at {sorted(places)}"
        except RuntimeError as error:
            found[name] = f"WAITS at {sorted(places)}: {error}"
    return found


@contextmanager
def synchronizing(mode: str) -> Iterator[None]:
    """What torch does in the block when the CPU waits for the GPU."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(place: Place) -> dict[str, Any]:
    """Parts of a step for which the CPU waits in fact: their calls return only when a sleeping GPU wakes up.

    torch does not know of all waits: a copy from ordinary memory may make the driver wait, if it is large.
    """
    place.needs_gpu()
    found = {}
    for name, call in calls(place, batch=512).items():
        call()
        call()
        place.wait()
        start = time.perf_counter()
        torch.cuda._sleep(_ASLEEP)
        call()
        host = time.perf_counter() - start
        place.wait()
        whole = time.perf_counter() - start
        found[name] = f"{'WAITS' if host > 0.8 * whole else 'no'} ({1000 * host:.1f} of {1000 * whole:.1f} ms)"
    return found


def parts(place: Place) -> dict[str, Any]:
    """Milliseconds of parts of a step on their own, per batch, and per image where that is what counts."""
    batch = 512 if place.on_gpu else 4
    found = {f"{name}, ms": 1000 * place.seconds(call) for name, call in calls(place, batch=batch).items()}
    found |= {
        f"{name}, ms per image": found[f"{name}, ms"] / batch
        for name in ("photometrics, global", "photometrics, local", "corruption")
    }
    found |= {f"loss K={k}, ms": 1000 * place.seconds(loss_call(place, batch, k)) for k in (4096, 65536)}
    queries, bank = (10_000, 50_000) if place.on_gpu else (50, 500)
    known, asked = (
        LabeledFeatures(
            F.normalize(torch.randn(n, 384, device=place.device)), torch.arange(n, device=place.device) % 10
        )
        for n in (bank, queries)
    )
    search = partial(knn, known, asked, ks=[10, 20, 100, 200], temperature=0.07)
    return {**found, f"kNN {queries:,} x {bank:,} x 384, s": place.seconds(search)}


def calls(place: Place, *, batch: int) -> dict[str, Callable[[], object]]:
    """Parts of steps of ViT-S, 2x224 + 10x96 (SiT: 2x224), and CIFAR's crops on the device; on a CPU of a tiny one."""
    if place.on_gpu:
        words: tuple[str, ...] = ("backbone=vit_small", "method.views.local_crops.count=10")
        prototypes = 65536
    else:
        words, prototypes = ("backbone=vit_cpu", "method.views.local_crops.size=24"), 256
    stepper = Stepper((*words, "trainer.compile=false"), batch=1, device=place.device)
    stepper.step()
    method, made = stepper.method, make_batch(stepper.config, batch, place.device)
    views = stepper.config.method.views
    side, width = views.global_crops.size, method.eval_backbone.embed_dim
    keys = view_keys(made.key, 0, 2 + views.local_crops.count)  # (B, V)
    sit = load_config("bench", ["method=sit"], BenchConfig).method
    corruption, clean = Corruption(sit.corruption), torch.randn(batch, 3, side, side, device=place.device)
    for parameter in method.student.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    gradients = [parameter.grad for parameter in method.student.parameters() if parameter.grad is not None]
    features, z = (torch.randn(n, d, device=place.device) for n, d in ((batch, width), (2 * batch, 256)))
    last = Prototypes(256, prototypes, norm_last_layer=True).to(place.device)
    targets = TeacherTargets(last(z), torch.zeros(prototypes, device=place.device), 0.04)
    cifar = MultiCrop(load_config("bench", [*VIT_CPU, "backbone.img_size=32"], BenchConfig).method.views)
    dataset = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=place.device)
    taken = torch.tensor(True, device=place.device)

    def corrupt() -> None:
        for view in (0, 1):
            corruption(clean, keys[:, view], view=view)

    return {
        "photometrics, global": lambda: method.color_augmentation(made.global_views, made.key),
        "photometrics, local": lambda: method.color_augmentation(made.local_views, made.key, first_view=2),
        "corruption": torch.no_grad()(corrupt),
        "crops of CIFAR": lambda: cifar.crop_batch(dataset, made.key),
        "drop path": lambda: sample_drop_paths(
            method.student.backbone.drop_paths, keys[:, 2:].T.flatten(), place.device
        ),
        "clip": lambda: clip_grad_per_parameter(gradients, norms(gradients), 3.0),
        "ema": lambda: update_ema(method.teacher, method.student, 0.996, taken),
        "optimizer": stepper.optimizer.step,
        "logged: rank and spread": lambda: (effective_rank(features), feature_std(features)),
        "logged: assignment": lambda: assignment_stats(targets),
    }


def loss_call(place: Place, batch: int, prototypes: int) -> Callable[[], None]:
    """The DINO loss of 2 + 10 views, forward and backward, with the prototypes' weight gradient."""
    last = Prototypes(256, prototypes, norm_last_layer=True).to(place.device)
    student, teacher = (F.normalize(torch.randn(views * batch, 256, device=place.device)) for views in (12, 2))
    student.requires_grad_()
    center = torch.zeros(prototypes, device=place.device)

    def call() -> None:
        with torch.autocast(place.device.type, torch.bfloat16):
            with torch.no_grad():
                targets = TeacherTargets(last(teacher), center, 0.04)
            dino_loss(last(student), targets, views=12, temperature=0.1).backward()
        last.zero_grad()

    return call


def graphs(place: Place) -> dict[str, Any]:
    """How many graphs the blocks compile to in three steps, how often these break, and odd names in checkpoints."""
    found: dict[str, Any] = {}
    real = torch.compile
    with patch("torch.compile", real if place.on_gpu else partial(real, backend="eager")):
        for name, words, expected in (("dino", VIT_CPU, 5), ("sit", SIT, 2)):
            torch._dynamo.reset()
            counters.clear()
            words = (*words, DROP_PATH, "trainer.compile=true", "trainer.fused_attention=true")
            stepper = Stepper(words, batch=4, device=place.device)
            for _ in range(3):
                stepper.step()
            count = counters["stats"]["unique_graphs"]
            found[f"{name} graphs"] = f"{count} {'as expected' if count == expected else f'INSTEAD OF {expected}'}"
            found[f"{name} breaks"] = sum(counters["graph_break"].values())
            odd = [key for key in stepper.method.state_dict() if "_orig_mod" in key]
            found[f"{name} odd keys"] = len(odd)
    return found


def agreement(place: Place, *, method: str) -> dict[str, Any]:
    """How far the losses of five steps in float32 on the GPU are from the CPU's, from the same seed."""
    words = (*(SIT if method == "sit" else VIT_CPU), DROP_PATH)
    sides = {"cpu": torch.device("cpu"), "device": place.device}
    if place.on_gpu:
        sides["compiled"] = place.device
    losses = {}
    for name, device in sides.items():
        compiled = f"trainer.compile={str(name == 'compiled').lower()}"
        stepper = Stepper((*words, compiled), batch=8, device=device, mixed=False)
        losses[name] = [float(stepper.step()) for _ in range(5)]
    apart = {
        f"largest difference, {name}": max(abs(a - b) for a, b in zip(own, losses["cpu"], strict=True))
        for name, own in losses.items()
        if name != "cpu"
    }
    return {**apart, **losses}
