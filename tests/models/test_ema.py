"""The EMA teacher."""

import pytest
import torch

from ssl_vit.models.ema import init_teacher, update_ema


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 1.0])
def test_update_ema_equals_the_formula(momentum):
    student = torch.nn.Linear(5, 3)
    teacher = init_teacher(torch.nn.Linear(5, 3), student)
    torch.testing.assert_close(teacher.weight, student.weight)
    with torch.no_grad():
        student.weight += 1
    before = teacher.weight.clone()
    update_ema(teacher, student, momentum, torch.tensor(False))
    assert torch.equal(teacher.weight, before)
    update_ema(teacher, student, momentum, torch.tensor(True))
    torch.testing.assert_close(teacher.weight, momentum * before + (1 - momentum) * student.weight)
    assert teacher.weight.data_ptr() != student.weight.data_ptr()
    assert not teacher.weight.requires_grad
