"""Sharding of weights, gradients and optimizer state over processes (FSDP2). Experimental."""

from __future__ import annotations

from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def apply_fsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model block by block, then the rest, in place.

    Weights are gathered only while their part computes; outside `forward`, parameters are the shards of this process.
    A model without blocks is small and stays gathered from its forward to its backward pass.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=bool(blocks))  # a teacher has no backward pass to do it
