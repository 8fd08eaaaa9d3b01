"""EMA teacher: a frozen model whose weights are a moving average of the student's."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ssl_vit.runtime.distributed import norms

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float, applied: Tensor) -> None:
    """Update teacher ← momentum · teacher + (1 - momentum) · student for all parameters, in place.

    Call it once per optimizer step; nothing changes if the step was not `applied`, () bool. Buffers stay unchanged, as
    in DINO.
    """
    theirs, ours = ([p.detach() for p in model.parameters()] for model in (teacher, student))
    weight = applied.to(ours[0].dtype) * (1 - momentum)
    if weight.is_cuda:  # lerp would need one launch per parameter
        difference = torch._foreach_sub(ours, theirs)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(theirs, difference)
    else:
        torch._foreach_lerp_(theirs, ours, [weight] * len(ours))


def init_teacher(teacher: ModuleT, student: nn.Module) -> ModuleT:
    """Copy the student's weights to a new teacher and freeze it."""
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False).eval()


@torch.no_grad()
def relative_parameter_distance(teacher: nn.Module, student: nn.Module) -> Tensor:
    """Compute ‖θ_teacher - θ_student‖ / ‖θ_student‖ over all parameters, a scalar; 0 if they are equal."""
    theirs, ours = ([p.detach() for p in model.parameters()] for model in (teacher, student))
    difference, length = (norms(x).norm() for x in (torch._foreach_sub(theirs, ours), ours))
    return torch.divide(difference, length)
