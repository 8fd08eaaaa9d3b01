"""Estimate the memory of a training step before it is computed, and name the keys that reduce it.

A system that runs out of memory kills a process without a word; a GPU raises an error of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.flops import empty_tensors, plain_modules
from ssl_vit.runtime.device import autocast_dtype, best_device
from ssl_vit.runtime.errors import AllRanksError
from ssl_vit.runtime.host_memory import HostMemory, host_memory
from ssl_vit.training.run_dir import AnyRun

_CHECKPOINTED = 0.6  # of the activations that are kept with activation checkpointing, at least
_WEIGHTS = 4  # copies of what is trained: weights, gradients, and Adam's two moments


class StepMemory(NamedTuple):
    """Bytes of a training step in one process."""

    fixed: int  # weights, gradients and moments
    per_image: int  # activations and views of an image

    def total(self, images: int) -> int:
        """Return the bytes of a step on so many images."""
        return self.fixed + images * self.per_image


def check_host_memory(config: AnyRun, method: SSLMethod) -> list[str]:
    """Return a warning if training on CPUs may need more memory than is available; nothing if it fits.

    Raises:
        AllRanksError: It needs more than this machine has.
    """
    device, memory = best_device(config.trainer.accelerator), host_memory()
    if device.type != "cpu" or memory is None:
        return []
    batch = config.trainer.micro_batch_size(config.data.batch_size)
    step = estimate_step(
        method,
        dtype=_dtype(config.trainer.precision, device),
        activation_checkpointing=config.trainer.activation_checkpointing,
    )
    needed = config.trainer.devices * step.total(batch)
    if needed < memory.available:
        return []
    text = _describe(config, method, step, needed, batch, memory)
    if needed > memory.total:
        raise AllRanksError(text)
    return [f"Memory: {text}"]


def estimate_step(
    method: SSLMethod, *, dtype: torch.dtype | None, activation_checkpointing: bool = False
) -> StepMemory:
    """Measure what a micro-step stores for its backward pass, by the difference of two images and one.

    Nothing is computed.
    """
    trained = sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    crops = method.views.global_crops, method.views.local_crops
    channels = method.eval_backbone.config.in_chans
    pixels = channels * sum(each.count * each.size**2 for each in crops)
    (one, largest_one), (two, largest_two) = (
        _saved_bytes(method, [(n, each.count, channels, each.size, each.size) for each in crops], dtype) for n in (1, 2)
    )
    saved, largest = two - one, largest_two - largest_one
    if activation_checkpointing:
        saved = int(_CHECKPOINTED * saved)
    # Each view as uint8 in the loader, waiting and used, and as float32 before and after the colors. The backward pass
    # adds the gradient of the largest activation, with its input.
    return StepMemory(_WEIGHTS * trained + one - saved, saved + 2 * largest + pixels * (3 + 2 * 4))


def _saved_bytes(method: SSLMethod, shapes: list[tuple[int, ...]], dtype: torch.dtype | None) -> tuple[int, int]:
    """Return the bytes of all tensors stored for the backward pass on one image, and of the largest one."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with plain_modules(method), FakeTensorMode(allow_non_fake_inputs=True):
        tensors = empty_tensors(method)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype, enabled=dtype is not None):
            functional_call(method, tensors, tuple(torch.empty(shape) for shape in shapes))
        weights = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
        sizes = [storage.nbytes() for key, storage in storages.items() if key not in weights]
    return sum(sizes), max(sizes, default=0)


def _dtype(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "auto":
        return autocast_dtype(device)
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def _describe(config: AnyRun, method: SSLMethod, step: StepMemory, needed: int, batch: int, memory: HostMemory) -> str:
    """Return what is needed, what there is, and the keys that bring it down, those with the largest effect first."""
    trainer, views = config.trainer, method.views
    backbone = method.eval_backbone.config
    crops = views.global_crops.size if not views.local_crops.count else views.local_crops.size
    fits = max(0, memory.available // trainer.devices - step.fixed) // max(1, step.per_image)
    keys = []
    if fits:
        parts = next(n for n in range(-(-batch // fits), batch + 1) if batch % n == 0)
        keys.append(f"trainer.accumulate_grad_batches={parts * trainer.accumulate_grad_batches}")
        keys.append(f"data.batch_size={fits * trainer.micro_batches} or less")
    if not trainer.activation_checkpointing:
        keys.append("trainer.activation_checkpointing=true")
    if views.local_crops.count:
        keys.append(f"a smaller method.views.local_crops.size ({crops}) or .count ({views.local_crops.count})")
    keys.append(f"a larger backbone.patch_size ({backbone.patch_size})")
    return (
        f"a step of {batch:,} images needs about {needed / 1e9:,.1f} GB, {step.per_image / 1e6:,.1f} MB per image; "
        f"{memory.available / 1e9:,.1f} of {memory.total / 1e9:,.1f} GB are available. It comes down with "
        + ", ".join(keys)
    )
