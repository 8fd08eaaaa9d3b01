"""A DINO step of ours against a textbook one, in turn: time, share of the matmul peak, and peak memory.

    PYTHONPATH=tests:. python tools/bench_training_step.py [s16|t4] [ROUNDS] [KEY=VALUE ...]

`s16`: ViT-S/16, 2x224 + 8x96, 65,536 prototypes, 8 images; the textbook with bf16 autocast and the same attention.
`t4`: ViT-T/4, 2x32 + 8x16, 65,536 prototypes, 32 images; the textbook as timm runs by default, fused, in float32.
Seconds of processor time with one thread, so that other work on the machine counts less; else of wall time.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.methods import DINOConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.batch import Batch
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.schedules import make_plan
from ssl_vit.runtime.device import measure_matmul
from ssl_vit.runtime.launch import disable_malloc_trim
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.training.trainer import build_method
from tests.reference.dino_step import TextbookDINO

_WARM_UP = 2  # steps

SETTINGS = {
    "s16": ("backbone=vit_small", "data.batch_size=8"),
    "t4": (
        *("backbone=vit_tiny", "backbone.patch_size=4", "backbone.img_size=32"),
        *("method.views.local_crops.size=16", "data.batch_size=32"),
    ),
}
SHARED = ("data.root=.", "method.head.prototypes=65536", "backbone.drop_path=0.0", "trainer.accelerator=cpu")


def ours(config: PretrainConfig) -> tuple[Callable[[], None], float]:
    """A step of the method as training runs it, photometrics included, and its FLOP."""
    method = build_method(config, make_plan(config, 10_000))
    SSLMethod.global_step = property(lambda self: 5_000)  # type: ignore[assignment,method-assign]
    SSLMethod.should_log = property(lambda self: False)  # type: ignore[assignment,method-assign]
    method._trainer = SimpleNamespace(precision_plugin=None)  # type: ignore[assignment]
    method.timer.start(torch.device("cpu"))
    optimizer = method.configure_optimizers()
    crops = [(pixels * 255).to(torch.uint8).transpose(0, 1).contiguous() for pixels in views_of(config)]
    index = torch.arange(config.data.batch_size)
    batch = Batch(*crops, index, index, sample_keys(0, 0, index))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.training_step(batch, 0)
        loss.backward()
        method.on_before_optimizer_step(optimizer)
        method.configure_gradient_clipping(optimizer)
        optimizer.step()
        method.after_optimizer_step(5_000, method.check.applied)
        optimizer.zero_grad()

    return step, method.count_flops().total * len(index)


def textbook(config: PretrainConfig, *, fused_attention: bool, mixed: bool) -> Callable[[], None]:
    """The same step as written in the paper, on views that are there already."""
    assert isinstance(config.method, DINOConfig)
    method = TextbookDINO(config.backbone, config.method.head, fused_attention=fused_attention)
    optimizer = torch.optim.AdamW([p for p in method.student.parameters() if p.requires_grad], lr=1e-4)
    views = [view for pixels in views_of(config) for view in pixels]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = method.loss(views, 0.1, 0.04)
        loss.backward()
        method.finish(optimizer, 3.0, 0.996)

    return step


def views_of(config: PretrainConfig) -> list[Tensor]:
    """Noise in [0, 1) as global (2, B, 3, S, S) and local views (L, B, 3, s, s)."""
    views, batch = config.method.views, config.data.batch_size
    return [torch.rand(c.count, batch, 3, c.size, c.size) for c in (views.global_crops, views.local_crops)]


def make(which: str, name: str, words: list[str]) -> Callable[[], None]:
    """The step that is called `ours` or `textbook`."""
    config = configured(which, words)
    if name == "ours":
        return ours(config)[0]
    return textbook(config, fused_attention=which == "t4", mixed=which == "s16")


def configured(which: str, words: list[str]) -> PretrainConfig:
    """The settings that both steps have."""
    return load_config("pretrain", [*SHARED, *SETTINGS[which], *words], PretrainConfig)


class Steps:
    """A process of its own that takes a step when it is told to."""

    def __init__(self, which: str, name: str, words: list[str]) -> None:
        command = [sys.executable, __file__, "serve", which, name, *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.before = float(self._line())  # GB in use before the first step
        self.seconds: list[float] = []

    def step(self) -> None:
        """Take one and note how long it took."""
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)
        self.seconds.append(float(self._line()))

    def finish(self) -> float:
        """End the process: the most memory in GB that it has held."""
        assert self.process.stdin
        self.process.stdin.close()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()


def serve(which: str, name: str, words: list[str]) -> None:
    """The other side of `Steps`."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    if name == "ours":
        disable_malloc_trim()  # as training does
    step = make(which, name, words)
    print(held("VmRSS"), flush=True)
    for _ in sys.stdin:
        start = clock()
        step()
        print(clock() - start, flush=True)
    print(held("VmHWM"), flush=True)


def held(field: str) -> float:
    """Of this process's memory in GB: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e9


def main(which: str = "s16", rounds: str = "7", *words: str) -> None:
    """Print the table."""
    _, flops = ours(configured(which, list(words)))
    both = {name: Steps(which, name, list(words)) for name in ("textbook", "ours")}
    peak = 0.0
    for _ in range(int(rounds) + _WARM_UP):
        peak = max(peak, measure_matmul("cpu", "bf16-mixed", seconds=0.3))
        for steps in both.values():
            steps.step()
    print(f"{which}, {torch.get_num_threads()} threads, {rounds} rounds; matmul peak in bf16 {peak / 1e9:.0f} GFLOP/s")
    for name, steps in both.items():
        each = steps.seconds[_WARM_UP:]
        median, best = statistics.median(each), min(each)
        print(
            f"{name:8} {median:6.3f} s a step ({best:.3f} to {max(each):.3f}): {flops / median / 1e9:.0f} GFLOP/s, "
            f"{flops / median / peak:.0%} of the peak (at best {flops / best / peak:.0%}); "
            f"memory {steps.finish():.2f} GB at most, {steps.before:.2f} before the first step"
        )
    pairs = zip(*(steps.seconds[_WARM_UP:] for steps in both.values()), strict=True)
    ratios = [textbook / ours for textbook, ours in pairs]
    print(f"textbook / ours: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main(*sys.argv[1:])
