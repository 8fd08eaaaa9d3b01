"""The DINO loss against the double loop over views, its center and its statistics."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.losses import dino
from ssl_vit.losses.dino import Center, FactoredLogits, TeacherTargets, assignment_stats, dino_loss
from tests.reference import losses as slow

APPLIED = torch.tensor(True)
SIZES = [(2, 1, 3), (2, 4, 7), (4, 3, 16), (10, 2, 64), (5, 3, 700)]  # views, batch, prototypes


def logits(values):
    """Return logits (..., K) as factors."""
    rows = values.flatten(0, -2)
    return FactoredLogits(rows, torch.eye(rows.shape[1], dtype=rows.dtype), torch.ones(rows.shape[1], dtype=rows.dtype))


def loss_of(student, teacher, center, *, temperature=0.1, target_temperature=0.04):
    """Compute the loss of dense logits (V, B, K) and (G, B, K)."""
    targets = TeacherTargets(logits(teacher), center, target_temperature)
    return dino_loss(logits(student), targets, views=len(student), temperature=temperature)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(dino, "_CPU_BLOCK", 8)
        monkeypatch.setattr(dino, "_MIN_COLUMNS", 5)


@pytest.mark.parametrize(("views", "batch", "prototypes"), SIZES)
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_dino_loss_equals_the_double_loop(views, batch, prototypes, temperature, blocks):
    generator = torch.Generator().manual_seed(views * batch)
    student = torch.empty(views, batch, prototypes).uniform_(-1, 1, generator=generator)
    teacher = torch.empty(2, batch, prototypes).uniform_(-1, 1, generator=generator)
    center = torch.empty(prototypes).uniform_(-0.3, 0.3, generator=generator)
    loss = loss_of(student, teacher, center, target_temperature=temperature)
    textbook = slow.dino(student.double().numpy(), teacher.double().numpy(), center.double().numpy(), 0.1, temperature)
    assert loss.item() == pytest.approx(textbook, rel=1e-6)


@pytest.mark.parametrize(("views", "batch", "prototypes"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_dino_loss_gradients_equal_those_of_the_dense_form(views, batch, prototypes, dtype, tolerance, blocks):
    """Of bottleneck, prototypes and their scale: the largest difference over the largest entry."""
    generator = torch.Generator().manual_seed(prototypes)

    def factors(rows):
        z = torch.nn.functional.normalize(torch.randn(rows, 8, generator=generator, dtype=torch.float64), dim=1)
        v = torch.randn(prototypes, 8, generator=generator, dtype=torch.float64)
        return [x.requires_grad_() for x in (z, v, v.norm(dim=1).reciprocal().detach())]

    student, (teacher, center) = factors(views * batch), (factors(2 * batch), torch.full((prototypes,), 0.05))
    dense = [(z @ v.T * scale).view(-1, batch, prototypes) for z, v, scale in (student, teacher)]
    textbook = slow.dino_dense(dense[0], dense[1].detach(), center.double(), 0.1, 0.05)
    targets = TeacherTargets(FactoredLogits(*(x.detach().to(dtype) for x in teacher)), center.to(dtype), 0.05)
    loss = dino_loss(FactoredLogits(*(x.to(dtype) for x in student)), targets, views=views, temperature=0.1)
    assert loss.item() == pytest.approx(textbook.item(), rel=min(1e-6, tolerance))
    for ours, theirs in zip(*(torch.autograd.grad(each * 3, student) for each in (loss, textbook)), strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_dino_loss_needs_no_tensor_of_all_logits():
    """For 65,536 prototypes and 64 crops all logits are 16 MiB."""
    widest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            shapes = [
                x.shape for x in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(x)
            ]
            widest.extend(shape.numel() for shape in shapes if 64 in shape)
            return result

    z, v = torch.randn(64, 4, requires_grad=True), torch.randn(65536, 4, requires_grad=True)
    student, teacher = (FactoredLogits(z[:n], v, torch.ones(65536)) for n in (64, 32))
    with Watch():
        targets = TeacherTargets(FactoredLogits(*(x.detach() for x in teacher)), torch.zeros(65536), 0.04)
        dino_loss(student, targets, views=4, temperature=0.1).backward()
    assert 0 < max(widest) <= 64 * 65536 / 8


def test_dino_loss_of_the_uniform_collapse_is_ln_k():
    for prototypes, plateau in [(1024, 6.9315), (4096, 8.3178), (65536, 11.0904)]:
        flat = FactoredLogits(torch.zeros(8, 1), torch.zeros(prototypes, 1), torch.ones(prototypes))
        targets = TeacherTargets(flat._replace(z=flat.z[:4]), torch.zeros(prototypes), 0.04)
        loss = dino_loss(flat, targets, views=4, temperature=0.1)
        assert loss.item() == pytest.approx(plateau, abs=1e-3)


def test_dino_loss_never_compares_a_view_with_itself():
    """A student that is perfect on its own view and wrong on the other must not be rewarded."""
    teacher = torch.eye(2)[:, None] * 100  # view 0 is prototype 0, view 1 is prototype 1
    same = loss_of(teacher, teacher, torch.zeros(2), temperature=1.0, target_temperature=1.0)
    crossed = loss_of(teacher.flip(0), teacher, torch.zeros(2), temperature=1.0, target_temperature=1.0)
    assert same.item() == pytest.approx(100)
    assert crossed.item() == pytest.approx(0, abs=1e-6)


def test_dino_loss_is_exact_under_autocast_without_gradient_to_the_teacher():
    student = torch.randn(4, 3, 32, requires_grad=True)
    teacher = torch.randn(2, 3, 32, requires_grad=True)
    plain = loss_of(student, teacher, torch.zeros(32))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_of(student, teacher, torch.zeros(32))
    assert mixed.item() == plain.item()
    mixed.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_dino_loss_does_not_overflow():
    """With a learned norm of the prototypes, logits are not bounded."""
    student, teacher = (1e4 * torch.randn(n, 3, 700, generator=torch.Generator().manual_seed(n)) for n in (4, 2))
    loss = loss_of(student.requires_grad_(), teacher, torch.zeros(700))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_center_is_the_running_mean_over_views_and_micro_batches():
    """Two micro-batches and one update equal one batch and one update; the official formula, step by step."""
    generator = torch.Generator().manual_seed(0)
    whole, split, textbook = Center(5, 0.9), Center(5, 0.9), np.zeros(5)
    for _ in range(4):
        values = torch.randn(2, 6, 5, generator=generator)
        whole.accumulate(logits(values))
        split.accumulate(logits(values[:, :2]))
        split.accumulate(logits(values[:, 2:]))
        whole.update(APPLIED)
        split.update(APPLIED)
        textbook = 0.9 * textbook + 0.1 * values.double().numpy().sum((0, 1)) / (2 * 6)
    np.testing.assert_allclose(whole.value, textbook, rtol=1e-5)
    np.testing.assert_allclose(split.value, whole.value, rtol=1e-5)


def test_center_is_exact_for_logits_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.nn.functional.normalize(torch.randn(n, 64, generator=generator), dim=1) for n in (256, 3000))
    center = Center(3000, 0.0)
    center.accumulate(FactoredLogits(z.bfloat16(), v.bfloat16(), torch.ones(3000)))
    center.update(APPLIED)
    exact = (z.bfloat16().double() @ v.bfloat16().double().T).mean(0)
    torch.testing.assert_close(center.value.double(), exact, rtol=0, atol=1e-7)


def test_center_is_in_the_state_dict():
    center = Center(3, 0.9)
    center.accumulate(logits(torch.ones(2, 1, 3)))
    center.update(APPLIED)
    restored = Center(3, 0.9)
    restored.load_state_dict(center.state_dict())
    torch.testing.assert_close(restored.value, torch.full((3,), 0.1))


def test_center_ignores_the_logits_of_a_skipped_step():
    center = Center(3, 0.9)
    center.accumulate(logits(torch.full((2, 1, 3), torch.nan)))
    center.update(~APPLIED)
    assert center.value.tolist() == [0, 0, 0]
    center.accumulate(logits(torch.ones(2, 1, 3)))
    center.update(APPLIED)
    torch.testing.assert_close(center.value, torch.full((3,), 0.1))


def test_assignment_stats_distinguish_both_collapses(blocks):
    def of(probabilities):
        return assignment_stats(TeacherTargets(logits(probabilities.clamp(min=1e-30).log()), torch.zeros(16), 1.0))

    uniform = of(torch.full((2, 8, 16), 1 / 16))
    single = of(torch.eye(16)[[3] * 16].view(2, 8, 16))
    healthy = of(torch.eye(16).view(2, 8, 16))
    assert uniform.entropy.item() == pytest.approx(math.log(16), abs=1e-5)
    assert uniform.kl_to_uniform.item() == pytest.approx(0, abs=1e-5)
    assert uniform.mutual_information.item() == pytest.approx(0, abs=1e-5)
    assert single.entropy.item() == pytest.approx(0, abs=1e-5)
    assert single.mutual_information.item() == pytest.approx(0, abs=1e-5)
    assert healthy.mutual_information.item() == pytest.approx(math.log(16), abs=1e-5)
