"""Whether a step's loss and gradients are finite: decided on the device, which never waits for the CPU to know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.runtime.distributed import all_reduce_max


class SkippedStep(NamedTuple):
    """An optimizer step that was left out because its loss or a gradient was not finite in some process."""

    parameters: list[str]  # those whose gradient was not finite in this process
    expected: bool  # while 16-mixed looks for its loss scale


class FiniteCheck:
    """Whether an optimizer step is taken. All processes decide the same.

    Args:
        names: P parameters with a gradient.
        sizes: The gradients' norms (P,).
        finite: Whether the step's losses are finite, () bool.
        loss_scale: Of 16-mixed.
    """

    def __init__(self, names: Sequence[str], sizes: Tensor, finite: Tensor, *, loss_scale: float | None = None) -> None:
        self.names = names
        self.loss_scale = loss_scale
        broken = ~sizes.isfinite()  # (P,)
        anywhere = all_reduce_max(torch.stack([~finite, broken.any()]).int()).bool()  # (2,): a loss, a gradient
        self.applied = ~anywhere.any()  # () bool, on the device
        self._on_cpu = torch.cat([anywhere, broken]).to("cpu", non_blocking=True)  # (2 + P,)
        self._arrived = torch.cuda.current_stream(sizes.device).record_event() if sizes.is_cuda else None

    def skipped(self) -> SkippedStep | None:
        """What there is to say of a step that was left out; waits until the device has come so far."""
        if self._arrived:
            self._arrived.synchronize()
        loss, gradient, *broken = self._on_cpu.tolist()
        if not (loss or gradient):
            return None
        # A loss scale that is too high is found by such steps; they are part of 16-bit training.
        expected = not loss and self.loss_scale is not None and self.loss_scale > 1
        return SkippedStep([name for name, bad in zip(self.names, broken, strict=True) if bad], expected)


def clip_grad_per_parameter(gradients: list[Tensor], sizes: Tensor, limit: float) -> None:
    """Scale each parameter's gradient down to an L2 norm of at most `limit`, one by one (DINO, `clip_gradients`).

    Not the norm of all gradients together: that is another algorithm.

    Args:
        gradients: P of them, changed in place.
        sizes: Their norms (P,).
        limit: Above 0.
    """
    torch._foreach_mul_(gradients, (limit / (sizes + 1e-6)).clamp(max=1).unbind())
