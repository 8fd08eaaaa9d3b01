"""The EMA teacher: a frozen copy that follows the student."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher ← momentum · teacher + (1 - momentum) · student, over all parameters, in place.

    Call it once per optimizer step. Buffers are not touched, as in DINO.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def start_teacher(teacher: ModuleT, student: nn.Module) -> ModuleT:
    """Give a newly built teacher the student's weights and freeze it."""
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False).eval()
