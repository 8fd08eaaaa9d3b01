"""Run commands as a user does, and read the runs that they write."""

import csv
import os
import subprocess
import sys
import time

import torch

from ssl_vit.cli import COMMANDS
from ssl_vit.commands.load_config import load_config

# Per command, overrides for the keys that have no default.
REQUIRED = {
    "demo": [],
    "pretrain": ["data.root=images"],
    "knn": ["checkpoint=runs/x", "data.root=labeled"],
    "linear": ["checkpoint=runs/x", "data.root=labeled"],
    "compare": ["runs/x"],
    "neighbors": ["checkpoint=runs/x", "data.root=images"],
    "features": ["checkpoint=runs/x", "data.root=labeled"],
    "fewshot": ["checkpoint=runs/x", "data.root=labeled"],
    "transfer": ["checkpoints=[runs/x]", "data.roots=[labeled]"],
    "finetune": ["checkpoint=runs/x", "data.root=labeled"],
    "attention": ["checkpoint=runs/x", "images=images"],
    "video": ["checkpoint=runs/x", "video=clip.mp4"],
    "propagate": ["checkpoint=runs/x", "davis=DAVIS"],
    "inspect": ["checkpoint=runs/x"],
    "report": ["run=runs/x"],
    "export": ["checkpoint=runs/x"],
    "scan": ["data.root=images"],
    "bench": [],
    "shard": ["data.root=images"],
}

# Columns of metrics.csv that differ from run to run.
TIMES = ("speed/", "online/seconds", "reference/seconds", "unlabeled/seconds")


def load(command, *overrides):
    """The validated configuration of a command with its required keys and the given overrides."""
    return load_config(command, [*REQUIRED[command], *overrides], COMMANDS[command].config_class())


def environment(**more):
    """The environment of a separate process, without the wandb service of this one."""
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**inherited, "OMP_NUM_THREADS": "1", **more}


def command(overrides, launcher=(), name="pretrain"):
    return [sys.executable, *launcher, "-m", "ssl_vit", name, *overrides]


def run_command(overrides, *, launcher=(), **more):
    """Run a command to its end, with `returncode`, `stdout` and `stderr`."""
    return subprocess.run(
        command(overrides, launcher), capture_output=True, text=True, env=environment(**more), timeout=240
    )


def start_command(overrides, *, name="pretrain", **more):
    """Start a command in a new process group, with both outputs in `stdout`."""
    return subprocess.Popen(
        command(overrides, name=name),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
        start_new_session=True,
    )


def wait_until(condition, process=None, *, seconds=120):
    """Wait until the condition holds or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            return
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def checkpoint(run, name="last.ckpt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)


def state(run, name="last.ckpt"):
    """The weights and buffers, and the number of optimizer steps."""
    content = checkpoint(run, name)
    return content["state_dict"], content["global_step"]


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_weights(one, other, name="last.ckpt"):
    (first, steps), (second, other_steps) = state(one, name), state(other, name)
    assert steps == other_steps
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def assert_same_run(one, other):
    """Weights, teacher, center, optimizer, the best checkpoint and every number of metrics.csv but the speed."""
    assert_same_weights(one, other)
    best = [run for run in (one, other) if (run / "checkpoints" / "best_knn.ckpt").exists()]
    assert best in ([], [one, other])
    if best:
        assert_same_weights(one, other, "best_knn.ckpt")
    first, second = (checkpoint(run)["optimizer_states"][0]["state"] for run in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n][key], second[n][key]) for n in first for key in ("step", "exp_avg", "exp_avg_sq"))
    first, second = (
        [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows(run)]
        for run in (one, other)
    )
    assert first == second
