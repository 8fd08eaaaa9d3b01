"""A GPU that is not there, for tests of what the CPU would wait for."""

from __future__ import annotations

from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class FakeGPU(FakeTensorMode):
    """In its `with` block, tensors on "cuda" have shapes and no values, and what needs a value of theirs raises.

    So does what takes numbers from the CPU to the GPU or back, but for copies that are `non_blocking`: it waits for all
    work that the GPU was given before. Tensors on the CPU are real.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.within = False  # an operation, of which this one is a part
        self.patches: list[MonkeyPatch] = []  # torch enters the mode again and again

    def __enter__(self) -> FakeGPU:
        self.patches.append(MonkeyPatch())
        self.patches[-1].setattr(Tensor, "pin_memory", lambda tensor: tensor)  # torch would ask a GPU
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.pop().undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        devices = {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        if "cuda" not in devices and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        on_cpu = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.ndim]
        crosses = bool(on_cpu) or (func in COPIES and "cpu" in devices)
        free = func in COPIES and (kwargs.get("non_blocking") or args[2:] == (True,))
        if crosses and not free and not self.within:
            raise RuntimeError(f"{func} waits: it takes numbers from the CPU to the GPU, or back")
        outermost, self.within = not self.within, True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.within = not outermost
