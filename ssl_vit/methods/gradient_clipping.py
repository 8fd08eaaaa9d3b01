"""Clipping of gradients per parameter, and the check that losses and gradients are finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.runtime.distributed import all_reduce_max


class SkippedStep(NamedTuple):
    """Optimizer step that was skipped because a loss or a gradient was not finite in some process."""

    parameters: list[str]  # with a gradient that is not finite in this process
    expected: bool  # while 16-mixed searches its loss scale


class FiniteCheck:
    """Decision whether an optimizer step is applied, the same in all processes and made on the device.

    From the names and gradient norms (P,) of P parameters, () bool `finite`: whether the losses of the step are, and
    the loss scale of 16-mixed.
    """

    def __init__(
        self, names: Sequence[str], gradient_norms: Tensor, finite: Tensor, *, loss_scale: float | None = None
    ) -> None:
        self.names = names
        self.loss_scale = loss_scale
        broken = ~gradient_norms.isfinite()  # (P,)
        anywhere = all_reduce_max(torch.stack([~finite, broken.any()]).int()).bool()  # (2,): a loss, a gradient
        self.applied = ~anywhere.any()  # () bool, on the device
        self._on_cpu = torch.cat([anywhere, broken]).to("cpu", non_blocking=True)  # (2 + P,)
        on_gpu = gradient_norms.is_cuda
        self._arrived = torch.cuda.current_stream(gradient_norms.device).record_event() if on_gpu else None

    def skipped(self) -> SkippedStep | None:
        """Return the step if it was skipped; waits until the device has decided."""
        if self._arrived:
            self._arrived.synchronize()
        loss, gradient, *broken = self._on_cpu.tolist()
        if not (loss or gradient):
            return None
        # Such steps detect a loss scale that is too high; they are part of 16-bit training.
        expected = not loss and self.loss_scale is not None and self.loss_scale > 1
        return SkippedStep([name for name, bad in zip(self.names, broken, strict=True) if bad], expected)


def clip_grad_per_parameter(gradients: list[Tensor], gradient_norms: Tensor, limit: float) -> None:
    """Scale each of P gradients down to an L2 norm of at most `limit`, in place, from their norms (P,).

    Not by the norm of all together (DINO, `clip_gradients`).
    """
    torch._foreach_mul_(gradients, (limit / (gradient_norms + 1e-6)).clamp(max=1).unbind())
