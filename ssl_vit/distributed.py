"""The few collective operations that losses, center and metrics need; without a process group they change nothing."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn import all_gather


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def first_process() -> bool:
    """Whether this is the process that writes files, known before the processes have met.

    Lightning and torchrun tell a process its place through the environment; the first that Lightning starts has none.
    """
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def all_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, without gradient."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def any_process(*flags: bool, device: torch.device) -> list[bool]:
    """For each flag, whether it is set in any process; `device` is the one that this process computes on."""
    if world_size() == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return votes.bool().tolist()


def all_mean(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, without gradient."""
    return all_sum(value) / world_size()


def gather(value: Tensor) -> Tensor:
    """(B, ...) of every process as (world x B, ...), in rank order, without gradient."""
    if world_size() == 1:
        return value
    everyone = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(everyone, value.contiguous())
    return torch.cat(everyone)


def gather_with_gradient(value: Tensor) -> Tensor:
    """(B, ...) of every process as (world x B, ...), in rank order; the gradient flows back to each."""
    return torch.cat(all_gather(value)) if world_size() > 1 else value  # type: ignore[no-untyped-call]
