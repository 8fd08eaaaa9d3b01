"""A model whose weights, gradients and optimizer state are spread over the processes (FSDP2). Experimental."""

from __future__ import annotations

from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def apply_fsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a model block by block, then what is outside its blocks; in place.

    Weights are whole only while their part computes. Outside of `forward` the parameters are this process's parts. What
    has no blocks is small: it stays whole from its forward to its backward pass.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=bool(blocks))  # a teacher has no backward pass to do it
