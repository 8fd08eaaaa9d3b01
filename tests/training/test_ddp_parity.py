"""One process and several that share its batches train the same model: loss, gradients, weights, metrics."""

from __future__ import annotations

import csv
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.models.checkpoint import load_backbone
from tests.benchmarks.ddp_parity import (
    ALL_CASES,
    CASES,
    IMAGES,
    PER_PROCESS,
    SMALL_VIEWS,
    WORLDS,
    build,
    differences,
    steps_of_all,
    views_of,
)
from tests.helpers.cli import run_command

THREE_STEPS = ("trainer.precision=32-true", "trainer.max_steps=3", "backbone.drop_path=0.2")


# --- losses and gradients, in float64 --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one():
    return steps_of_all()


@pytest.fixture(scope="module", params=WORLDS, ids="{} processes".format)
def found(one, request):
    return differences(one, request.param)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_losses_and_gradients_are_those_of_one_process(found, case):
    assert found[case].loss < 1e-12
    assert found[case].gradient < 1e-12


def test_backbone_interpolates_positions_exactly_to_float32(found):
    assert found[SMALL_VIEWS].loss < 1e-12
    assert found[SMALL_VIEWS].gradient < 1e-7


def test_ddp_parity_finds_what_a_process_does_for_itself(found):
    assert found[PER_PROCESS].loss > 0.01
    assert found[PER_PROCESS].gradient > 0.01


@pytest.mark.parametrize("world", WORLDS)
def test_ddp_parity_covers_different_numbers_of_hidden_pixels(world):
    """Else a mean per process would do for the reconstruction of corrupted pixels."""
    method, config = build(ALL_CASES["SiT", "reconstruction of corrupted pixels"])
    views, _, key = views_of(config, micro_batch=0)
    counts = {
        int(method.pretext_views(method.config, part, some).mask.sum())
        for part, some in zip(views.chunk(world), key.chunk(world), strict=True)
    }
    assert len(counts) == world
    assert IMAGES // world % 4 == 0


# --- three steps through the Trainer ---------------------------------------------------------------------------


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def without_key_biases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Softmax cancels them: their gradient is 0 but for rounding, and Adam makes steps as large as any of that."""
    parts = {name: value.chunk(3) for name, value in state.items() if name.endswith("attn.qkv.bias")}
    assert parts
    return state | {name: torch.cat([query, value]) for name, (query, _, value) in parts.items()}


def assert_same_training(one: Path, other: Path) -> None:
    first, second = (without_key_biases(weights(run)) for run in (one, other))
    assert first.keys() == second.keys()
    difference = {name: float((first[name] - second[name]).abs().max()) for name in first}
    assert max(difference.values()) < 1e-6, sorted(difference.items(), key=lambda item: -item[1])[:3]
    tables = [list(csv.DictReader((run / "metrics.csv").open(newline=""))) for run in (one, other)]
    assert len(tables[0]) == len(tables[1]) == 3
    for row, expected in zip(*tables, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            if not name.startswith("speed/"):
                assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-5), name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_torchrun_starts_it(rank: int, world: int, port: int, config: PretrainConfig) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in (place | meeting).items()}
    torch.set_num_threads(1)
    pretrain(config)


@pytest.mark.parametrize(("method", "accumulate"), [("dino", 2), ("sit", 1)])
def test_ddp_three_steps_on_two_processes_are_those_of_one(pretrain_config, method, accumulate):
    """Metrics are of the whole batch, too: all processes, all micro-batches."""
    words = (*THREE_STEPS, f"method={method}", f"trainer.accumulate_grad_batches={accumulate}")
    one = pretrain(pretrain_config(*words, "run.name=one"))
    config = pretrain_config(*words, "run.name=two", "trainer.devices=2")
    multiprocessing.set_forkserver_preload(["ssl_vit.commands.pretrain"])
    start_processes(as_torchrun_starts_it, (2, free_port(), config), nprocs=2, start_method="forkserver")
    assert_same_training(one, config.run.path)


def test_ddp_three_steps_from_weights_are_those_of_one_process(pretrain_words, tiny_model):
    """One with a frozen backbone, one in its ramp, one after it; with an anchor and low-rank updates."""
    words = [word for word in pretrain_words(*THREE_STEPS) if not word.startswith("backbone")]
    start = ("start.freeze_backbone=1steps", "start.ramp=1steps", "start.backbone_lr=1e-4", "start.trainable=lora_2")
    words += [f"checkpoint={tiny_model}", *start, "anchor=features"]
    one = pretrain(load_config("pretrain", [*words, "run.name=one"], PretrainConfig))
    config = load_config("pretrain", [*words, "run.name=two", "trainer.devices=2"], PretrainConfig)
    multiprocessing.set_forkserver_preload(["ssl_vit.commands.pretrain"])
    start_processes(as_torchrun_starts_it, (2, free_port(), config), nprocs=2, start_method="forkserver")
    assert_same_training(one, config.run.path)


@pytest.mark.parametrize("method", ["dino", "sit"])
def test_fsdp_three_steps_are_those_of_a_whole_model(pretrain_config, method):
    """FSDP2; its checkpoint and its exported backbone are whole."""
    words = (*THREE_STEPS, f"method={method}", "method.optimizer.grad_clip=0.01")
    one = pretrain(pretrain_config(*words, "run.name=one"))
    config = pretrain_config(*words, "run.name=sharded", "trainer.devices=2", "trainer.strategy=fsdp")
    multiprocessing.set_forkserver_preload(["ssl_vit.commands.pretrain"])
    start_processes(as_torchrun_starts_it, (2, free_port(), config), nprocs=2, start_method="forkserver")
    assert_same_training(one, config.run.path)
    images = torch.rand(2, 3, 48, 48)
    whole, sharded = (load_backbone(str(run / "backbone.safetensors")).backbone for run in (one, config.run.path))
    torch.testing.assert_close(whole(images).cls, sharded(images).cls, rtol=1e-4, atol=1e-5)


def train(words, launcher=()):
    done = run_command(words, launcher=launcher)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "sit"])
def test_ddp_by_lightning_and_torchrun_train_the_same(pretrain_words, tmp_path, method):
    """Two processes, and four; each against one, and the two ways of starting against each other."""
    words = pretrain_words(*THREE_STEPS, f"method={method}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train([*words, "run.name=one"])
    train([*words, "run.name=two", "trainer.devices=2"])
    train([*words, "run.name=four", "trainer.devices=4"])
    train([*words, "run.name=torchrun", "trainer.devices=2"], torchrun)
    runs = tmp_path / "runs"
    assert_same_training(runs / "one", runs / "two")
    assert_same_training(runs / "one", runs / "four")
    by_lightning, by_torchrun = weights(runs / "two"), weights(runs / "torchrun")
    assert all(torch.equal(by_lightning[name], by_torchrun[name]) for name in by_lightning)


def test_batch_stays_where_lightning_put_it():
    """Torch's DDP would move the images' keys to the GPU, where the CPU would have to wait for them."""
    from ssl_vit.config.pretrain import TrainerConfig
    from ssl_vit.training.trainer import make_strategy

    strategy = make_strategy(
        TrainerConfig.model_construct(devices=2, num_nodes=1, strategy="auto"), torch.device("cuda")
    )
    assert strategy.determine_ddp_device_ids() is None
    assert strategy.process_group_backend == "cpu:gloo,cuda:nccl"
