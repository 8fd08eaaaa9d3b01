"""Collective operations of losses, center and metrics; without a process group they return their input."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn import all_gather
from torch.distributed.tensor import DTensor


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def shutdown_process_group() -> None:
    """Wait for all processes and destroy the process group; processes that exit while connected may abort others."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of `value` over all processes, without gradient."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_reduce_max(value: Tensor) -> Tensor:
    """Return the elementwise maximum of `value` over all processes."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def any_rank(*flags: bool) -> list[bool]:
    """Return for each flag whether it is set on any rank. Uses CPU tensors, so that no device waits."""
    return all_reduce_max(torch.tensor(flags, dtype=torch.int32)).bool().tolist()


def equal_on_all_ranks(text: str) -> bool:
    """Return whether `text` is the same on all ranks."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    return all_reduce_max(torch.tensor([number, -number])).tolist() == [number, -number]


def all_reduce_mean(value: Tensor) -> Tensor:
    """Return the mean of `value` over all processes, without gradient."""
    return all_reduce_sum(value) / world_size()


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each tensor, (N,); of the full tensor where it is sharded over processes (FSDP2)."""
    each = torch._foreach_norm(list(tensors))
    return torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in each])


def gather_from_ranks(value: Tensor) -> Tensor:
    """Concatenate (B, ...) of all processes to (world x B, ...) in rank order, without gradient."""
    if world_size() == 1:
        return value
    gathered = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(gathered, value.contiguous())
    return torch.cat(gathered)


def gather_with_gradient(value: Tensor) -> Tensor:
    """Concatenate (B, ...) of all processes to (world x B, ...) in rank order, with gradient to each."""
    return torch.cat(all_gather(value)) if world_size() > 1 else value  # type: ignore[no-untyped-call]
