"""Floating-point operations of a training step per image, counted by torch on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.models.backbone import Backbone


class Flops(NamedTuple):
    """FLOP per image of one training step, at 2 FLOP per multiply-add."""

    backbones: dict[str, int]  # by the name of the model that a backbone is in, such as teacher and student
    heads: int

    @property
    def total(self) -> int:
        """Sum over backbones and heads."""
        return sum(self.backbones.values()) + self.heads

    def parts(self) -> dict[str, int]:
        """Return the summands of the total by name."""
        return {**self.backbones, "heads": self.heads}


def count_flops(model: nn.Module, *shapes: Sequence[int]) -> Flops:
    """Count the matrix products of a forward and a backward pass on one image; nothing is computed.

    A trained model thus counts three times its forward pass, its patch embedding twice (images need no gradient), and a
    teacher once. Not counted are element-wise operations and what is computed twice to save memory.

    Args:
        model: Anything that contains backbones; its `forward` returns a sequence of tensors.
        shapes: Of the inputs of `forward`.
    """
    with plain_modules(model), FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        tensors = empty_tensors(model)
        outputs = functional_call(model, tensors, tuple(torch.empty(shape) for shape in shapes))
        torch.stack([output.sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    names = [name for name, module in model.named_modules() if isinstance(module, Backbone)]
    used = {name.partition(".")[0]: f"{type(model).__name__}.{name}" for name in names}
    backbones = {name: counts[path] for name, path in used.items() if path in counts}
    return Flops(backbones, counts["Global"] - sum(backbones.values()))


def count_forward_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """Count the matrix products of a forward pass without gradient, on an input of this shape."""
    with plain_modules(model), FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            functional_call(model, empty_tensors(model), (torch.empty(shape),))
        return int(counter.get_total_flops())


def empty_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return tensors for all parameters and buffers of a model, by name; in a FakeTensorMode they have no values."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


@contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Within it, modules are in evaluation mode and compute by their class's own `forward`."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    replaced = [vars(module).pop("forward", None) for module in modules]  # compiled, checkpointed, matrix products
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention computes its weights twice
            yield
    finally:
        for module, mode, forward in zip(modules, modes, replaced, strict=True):
            module.training = mode
            if forward is not None:
                module.forward = forward
