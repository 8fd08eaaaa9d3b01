"""A GPU that computes nothing but knows all shapes: an operation that would make the CPU wait for it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)


class WaitsForGPUError(AssertionError):
    """The CPU would have to wait for the GPU to finish."""


class FakeGPU(TorchDispatchMode):
    """Operations on GPU tensors, and copies to it, are only recorded in their shapes; those on the CPU are real.

    Values, or shapes that depend on values, cannot be asked for: torch raises. A copy to the CPU that waits raises too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, (torch.Tensor, torch.device))]
        on_gpu = [leaf for leaf in leaves if leaf == GPU or getattr(leaf, "is_cuda", False)]
        if not on_gpu and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        to_cpu = kwargs.get("device") == torch.device("cpu")
        if to_cpu and not kwargs.get("non_blocking"):
            raise WaitsForGPUError(f"{func} to the CPU")
        args, kwargs = tree_map(self._faked, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    def _faked(self, leaf):
        return self.fake.from_tensor(leaf) if type(leaf) in (torch.Tensor, torch.nn.Parameter) else leaf


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, `to("cuda:0")` works without a GPU."""
    with pytest.MonkeyPatch.context() as patch, FakeGPU():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: None))
        yield
