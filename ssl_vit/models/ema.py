"""The EMA teacher: a frozen copy that follows the student."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ssl_vit.runtime.distributed import norms

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float, applied: Tensor) -> None:
    """Teacher ← momentum · teacher + (1 - momentum) · student, over all parameters, in place.

    Call it once per optimizer step; where the step was not `applied`, () bool, nothing changes. Buffers are not touched,
    as in DINO.
    """
    theirs, ours = ([p.detach() for p in model.parameters()] for model in (teacher, student))
    weight = applied.to(ours[0].dtype) * (1 - momentum)
    if weight.is_cuda:  # where lerp would take as many launches as there are parameters
        way = torch._foreach_sub(ours, theirs)
        torch._foreach_mul_(way, weight)
        torch._foreach_add_(theirs, way)
    else:
        torch._foreach_lerp_(theirs, ours, [weight] * len(ours))


def init_teacher(teacher: ModuleT, student: nn.Module) -> ModuleT:
    """Give a newly built teacher the student's weights and freeze it."""
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False).eval()


@torch.no_grad()
def relative_parameter_distance(teacher: nn.Module, student: nn.Module) -> Tensor:
    """‖θ_teacher - θ_student‖ / ‖θ_student‖ over all parameters, a scalar; 0 when they are the same model."""
    theirs, ours = ([p.detach() for p in model.parameters()] for model in (teacher, student))
    apart, size = (norms(x).norm() for x in (torch._foreach_sub(theirs, ours), ours))
    return torch.divide(apart, size)
