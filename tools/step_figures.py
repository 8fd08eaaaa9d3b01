"""A DINO step of ours against a textbook one, in turn: time, share of the matmul peak, and peak memory.

    PYTHONPATH=tests:. python tools/step_figures.py [s16|t4] [ROUNDS] [KEY=VALUE ...]

`s16`: ViT-S/16, 2x224 + 8x96, 65,536 prototypes, 8 pictures; the textbook with bf16 autocast and the same attention.
`t4`: ViT-T/4, 2x32 + 8x16, 65,536 prototypes, 32 pictures; the textbook as timm runs by default, fused, in float32.
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
from reference.dino_step import TextbookDINO
from torch import Tensor

from ssl_vit.commands.compose import load_config
from ssl_vit.config import DINOConfig, PretrainConfig
from ssl_vit.methods.base import SSLMethod, make_plan
from ssl_vit.training.flops import flops_per_picture
from ssl_vit.training.hardware import measure_matmul
from ssl_vit.training.trainer import build_method
from ssl_vit.transforms.batch import Batch
from ssl_vit.transforms.randomness import sample_keys

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
    SSLMethod.at_log_step = property(lambda self: False)  # type: ignore[assignment,method-assign]
    method._trainer = SimpleNamespace(precision_plugin=None)  # type: ignore[assignment]
    method.laps.start(torch.device("cpu"))
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
        method.after_optimizer_step(5_000, method.check.taken)
        optimizer.zero_grad()

    return step, flops_per_picture(config.method, method.target).total * len(index)


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


def held_gb(which: str, name: str, words: list[str]) -> str:
    """Most memory in GB that a process of its own holds for three steps, and what it holds before the first."""
    command = [sys.executable, __file__, "memory", which, name, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def print_held(which: str, name: str, words: list[str]) -> None:
    """Print what `held_gb` gives."""
    step = make(which, name, words)
    before = held("VmRSS")
    for _ in range(3):
        step()
    print(f"{held('VmHWM'):.2f} GB ({before:.2f} before the first step)")


def held(field: str) -> float:
    """Of this process's memory in GB: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e9


def main(which: str = "s16", rounds: str = "7", *words: str) -> None:
    """Print the table."""
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    our_step, flops = ours(configured(which, list(words)))
    steps = {"textbook": make(which, "textbook", list(words)), "ours": our_step}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peak = 0.0
    for number in range(int(rounds) + 1):
        peak = max(peak, measure_matmul("cpu", "bf16-mixed", seconds=0.3))
        for name, step in steps.items():
            start = clock()
            step()
            if number:  # the first one warms up
                seconds[name].append(clock() - start)
    print(f"{which}, {threads} threads, {rounds} rounds; matmul peak in bf16 {peak / 1e9:.0f} GFLOP/s")
    for name, each in seconds.items():
        median, best = statistics.median(each), min(each)
        print(
            f"{name:8} {median:6.3f} s a step ({best:.3f} to {max(each):.3f}): {flops / median / 1e9:.0f} GFLOP/s, "
            f"{flops / median / peak:.0%} of the peak (at best {flops / best / peak:.0%}); "
            f"memory {held_gb(which, name, list(words))}"
        )
    ratios = [a / b for a, b in zip(seconds["textbook"], seconds["ours"], strict=True)]
    print(f"textbook / ours: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print_held(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main(*sys.argv[1:])
