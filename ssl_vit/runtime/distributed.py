"""The few collective operations that losses, center and metrics need; without a process group they change nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn import all_gather
from torch.distributed.tensor import DTensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def shutdown_process_group() -> None:
    """Let the processes part, once they all have come here; those that end connected may abort one another."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, without gradient."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_max(value: Tensor) -> Tensor:
    """The largest of each element of `value` in all processes."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process. The CPUs settle it among themselves: no device waits."""
    return all_max(torch.tensor(flags, dtype=torch.int32)).bool().tolist()


def equal_on_all_ranks(text: str) -> bool:
    """Whether `text` is the same in all processes."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    return all_max(torch.tensor([number, -number])).tolist() == [number, -number]


def all_mean(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, without gradient."""
    return all_reduce_sum(value) / world_size()


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor (N,), of the whole one where each process has a part (FSDP2)."""
    each = torch._foreach_norm(list(tensors))
    return torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in each])


def gather_from_ranks(value: Tensor) -> Tensor:
    """(B, ...) of every process as (world x B, ...), in rank order, without gradient."""
    if world_size() == 1:
        return value
    everyone = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(everyone, value.contiguous())
    return torch.cat(everyone)


def gather_with_gradient(value: Tensor) -> Tensor:
    """(B, ...) of every process as (world x B, ...), in rank order; the gradient flows back to each."""
    return torch.cat(all_gather(value)) if world_size() > 1 else value  # type: ignore[no-untyped-call]
