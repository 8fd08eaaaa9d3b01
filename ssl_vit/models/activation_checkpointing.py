"""Activation checkpointing that keeps the outputs of linear layers and recomputes the rest in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from ssl_vit.models.drop_path import DropPath

_Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]  # of the two passes
_KEPT = {torch.ops.aten.addmm.default, torch.ops.aten.mm.default}


def enable_activation_checkpointing(blocks: Iterable[Block], *, whole_blocks: bool) -> None:
    """Change blocks in place to recompute norms, attention and GELU in the backward pass, with the same results.

    With `whole_blocks` they recompute the linear layers as well, which compiled blocks need.
    """
    selective = partial(create_selective_checkpoint_contexts, _keep_linear_layers)
    contexts: _Contexts = noop_context_fn if whole_blocks else selective
    for block in blocks:
        paths = [module for module in block.modules() if isinstance(module, DropPath)]
        block.forward = partial(_checkpointed_forward, block.forward, paths, contexts)


def _checkpointed_forward(
    forward: Callable[[Tensor], Tensor], paths: list[DropPath], contexts: _Contexts, x: Tensor
) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x)

    def run(x: Tensor, *scales: Tensor) -> Tensor:
        for path, scale in zip(paths, scales, strict=True):
            path.scale = scale  # a later pass may have sampled other paths by then
        device = x.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Weights that autocast has cached for an earlier pass would be missing in the recomputation.
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            return forward(x)

    result: Tensor = checkpoint(
        run, x, *[path.scale for path in paths], use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return result


def _keep_linear_layers(_: SelectiveCheckpointContext, operation: object, *args: object, **kwargs: object) -> object:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
