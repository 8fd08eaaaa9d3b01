"""Do several processes that share a batch get the loss and the gradients of one process? Prints the differences.

    python tools/ddp_parity.py

Two steps of each case on 1, 2 and 4 processes (CPU, gloo) in float64, with drop path and SiT's full corruption; the
second step starts from what the first one did to weights, teacher and center.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.batch import Batch
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.schedules import make_plan
from ssl_vit.runtime.distributed import all_reduce_mean, rank, world_size
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.training.trainer import build_method, silence_lightning

WORLDS = (2, 4)
STEPS = 2
LEARNING_RATE = 0.1  # of plain gradient descent
IMAGES = 16  # per micro-batch, over all processes
SHRUNK = (
    "backbone=vit_cpu",
    "backbone.embed_dim=32",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "backbone.drop_path=0.2",
    "trainer.log_every_n_steps=1",
    "data.root=.",
)
SHRUNK_DINO = (
    "method.views.local_crops.count=2",
    "method.views.local_crops.size=48",
    "method.head.prototypes=64",
    "method.head.hidden_dim=32",
    "method.head.bottleneck_dim=16",
)
SIT = "method=sit"
NO_ROTATION, NO_CONTRASTIVE, NO_RECONSTRUCTION = (
    f"method.{loss}.enabled=false" for loss in ("rotation", "contrastive", "reconstruction")
)

CASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("DINO", "centering"): SHRUNK_DINO,
    ("DINO", "centering, 2 micro-batches"): (*SHRUNK_DINO, "trainer.accumulate_grad_batches=2"),
    ("SiT", "rotation"): (SIT, NO_CONTRASTIVE, NO_RECONSTRUCTION),
    ("SiT", "contrastive, gathered"): (SIT, NO_ROTATION, NO_RECONSTRUCTION),
    ("SiT", "reconstruction of all pixels"): (SIT, NO_ROTATION, NO_CONTRASTIVE),
    ("SiT", "reconstruction of corrupted pixels"): (
        SIT,
        NO_ROTATION,
        NO_CONTRASTIVE,
        "method.reconstruction.loss_on=corrupted",
    ),
    ("SiT", "all three, uncertainty weights"): (SIT,),
    ("SiT", "all three, uncertainty weights, 2 micro-batches"): (SIT, "trainer.accumulate_grad_batches=2"),
    ("SiT", "all three, fixed weights"): (SIT, "method.weighting=fixed"),
}
# timm interpolates the positions in float32, so that their gradient is no more exact than that.
SMALL_VIEWS = ("DINO", "centering, local views of half the size")
# What cannot agree: here negatives are those of the process alone, as in SiT v1.
PER_PROCESS = ("SiT", "contrastive, not gathered")
ALL_CASES = {
    **CASES,
    SMALL_VIEWS: (*SHRUNK_DINO, "method.views.local_crops.size=24"),
    PER_PROCESS: (SIT, NO_ROTATION, NO_RECONSTRUCTION, "method.contrastive.gather=false"),
}


class Step(NamedTuple):
    """What the processes together make of a batch."""

    loss: Tensor  # () float64
    gradient: Tensor  # of all parameters, in a row


class Difference(NamedTuple):
    """The largest differences between one process and several, over all steps and parameters."""

    loss: float
    gradient: float


def build(words: tuple[str, ...]) -> tuple[SSLMethod, PretrainConfig]:
    """A small model in float64 from the shipped configuration, in training mode."""
    config = load_config("pretrain", [*SHRUNK, *words], PretrainConfig)
    return build_method(config, make_plan(config, num_images=1000)).double().train(), config


def views_of(config: PretrainConfig, *, micro_batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Global views (B, G, C, H, W) and local views (B, L, C, h, w) of noise, and keys (B,), of all processes."""
    generator = torch.Generator().manual_seed(micro_batch)
    global_views, local_views = (
        torch.randn(IMAGES, crops.count, 3, crops.size, crops.size, generator=generator, dtype=torch.float64)
        for crops in (config.method.views.global_crops, config.method.views.local_crops)
    )
    return global_views, local_views, sample_keys(0, 0, torch.arange(IMAGES) + IMAGES * micro_batch)


def steps_of(words: tuple[str, ...]) -> list[Step]:
    """Train on this process's part of each batch."""
    method, config = build(words)
    accumulate, steps = config.trainer.accumulate_grad_batches, []
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for micro_batch in range(step * accumulate, (step + 1) * accumulate):
            whole = views_of(config, micro_batch=micro_batch)
            global_views, local_views, key = (part.chunk(world_size())[rank()] for part in whole)
            batch = Batch(global_views, local_views, torch.zeros_like(key), torch.zeros_like(key), key)
            loss = method.step(global_views, local_views, batch).loss / accumulate
            loss.backward()
            total += loss.detach()
        gradient = all_reduce_mean(parameters_to_vector([parameter.grad for parameter in parameters]))
        steps.append(Step(all_reduce_mean(total), gradient))
        vector_to_parameters(parameters_to_vector(parameters).detach() - LEARNING_RATE * gradient, parameters)
        method.zero_grad()
        method.after_optimizer_step(step, torch.tensor(True))
    return steps


def steps_of_all() -> dict[tuple[str, str], list[Step]]:
    """Every case in this process's part."""
    return {case: steps_of(words) for case, words in ALL_CASES.items()}


def process(number: int, world: int, folder: Path) -> None:
    """One of `world` processes, all of which run every case."""
    torch.set_num_threads(1)
    silence_lightning()
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=number, world_size=world)
    results = steps_of_all()
    if number == 0:
        plain = {case: [tuple(step) for step in steps] for case, steps in results.items()}
        torch.save(plain, folder / "results.pt")
    dist.destroy_process_group()


def differences(one: dict[tuple[str, str], list[Step]], world: int) -> dict[tuple[str, str], Difference]:
    """Every case on `world` processes against what `one` made of it."""
    # The processes are copies of one that has the libraries loaded already.
    multiprocessing.set_forkserver_preload(["ssl_vit.commands.pretrain"])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(process, (world, Path(folder)), nprocs=world, start_method="forkserver")
        results = torch.load(Path(folder) / "results.pt", weights_only=True)
    return {case: difference(one[case], [Step(*step) for step in results[case]]) for case in ALL_CASES}


def difference(one: list[Step], several: list[Step]) -> Difference:
    """The largest absolute differences."""
    pairs = list(zip(one, several, strict=True))
    return Difference(
        max(float((a.loss - b.loss).abs()) for a, b in pairs),
        max(float((a.gradient - b.gradient).abs().max()) for a, b in pairs),
    )


def main() -> None:
    """Print the table."""
    print("| method | loss | processes | largest loss difference | largest gradient difference |")
    print("|---|---|---|---|---|")
    one = steps_of_all()
    for world in WORLDS:
        for (method, loss), found in differences(one, world).items():
            print(f"| {method} | {loss} | {world} | {found.loss:.0e} | {found.gradient:.0e} |")


if __name__ == "__main__":
    main()
