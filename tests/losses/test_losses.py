"""The losses equal their slow textbook forms, and behave as the papers say."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.losses import factored_logits as blockwise
from ssl_vit.losses.dino import Center, TeacherTargets, assignment_stats, dino_loss
from ssl_vit.losses.factored_logits import FactoredLogits
from ssl_vit.losses.nt_xent import nt_xent
from ssl_vit.losses.reconstruction import reconstruction_l1
from ssl_vit.losses.uncertainty_weighting import FixedWeights, UncertaintyWeights
from tests.reference import losses as slow

TAKEN = torch.tensor(True)
SIZES = [(2, 1, 3), (2, 4, 7), (4, 3, 16), (10, 2, 64), (5, 3, 700)]  # views, batch, prototypes


def logits(values):
    """Given values (..., K) as factors."""
    rows = values.flatten(0, -2)
    return FactoredLogits(rows, torch.eye(rows.shape[1], dtype=rows.dtype), torch.ones(rows.shape[1], dtype=rows.dtype))


def loss_of(student, teacher, center, *, temperature=0.1, target_temperature=0.04):
    """The loss of plain logits (V, B, K) and (G, B, K)."""
    targets = TeacherTargets(logits(teacher), center, target_temperature)
    return dino_loss(logits(student), targets, views=len(student), temperature=temperature)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(blockwise, "_ENTRIES", {"cpu": 8})
        monkeypatch.setattr(blockwise, "_FEWEST_COLUMNS", 5)


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
def test_dino_gradients_equal_those_of_the_dense_form(views, batch, prototypes, dtype, tolerance, blocks):
    """Bottleneck, prototypes and their scale; the largest difference over the largest entry."""
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


def test_dino_loss_holds_no_block_as_wide_as_all_prototypes():
    """Of 65,536 prototypes and 64 crops a block of logits would be 16 MiB."""
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


def test_dino_loss_is_exact_under_autocast_and_sends_no_gradient_to_the_teacher():
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
    """Prototypes whose norm is learned may give any logits."""
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
        whole.observe(logits(values))
        split.observe(logits(values[:, :2]))
        split.observe(logits(values[:, 2:]))
        whole.update(TAKEN)
        split.update(TAKEN)
        textbook = 0.9 * textbook + 0.1 * values.double().numpy().sum((0, 1)) / (2 * 6)
    np.testing.assert_allclose(whole.value, textbook, rtol=1e-5)
    np.testing.assert_allclose(split.value, whole.value, rtol=1e-5)


def test_center_is_exact_though_the_logits_are_multiplied_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.nn.functional.normalize(torch.randn(n, 64, generator=generator), dim=1) for n in (256, 3000))
    center = Center(3000, 0.0)
    center.observe(FactoredLogits(z.bfloat16(), v.bfloat16(), torch.ones(3000)))
    center.update(TAKEN)
    exact = (z.bfloat16().double() @ v.bfloat16().double().T).mean(0)
    torch.testing.assert_close(center.value.double(), exact, rtol=0, atol=1e-7)


def test_center_travels_in_the_state_dict():
    center = Center(3, 0.9)
    center.observe(logits(torch.ones(2, 1, 3)))
    center.update(TAKEN)
    restored = Center(3, 0.9)
    restored.load_state_dict(center.state_dict())
    torch.testing.assert_close(restored.value, torch.full((3,), 0.1))


def test_center_forgets_what_a_step_that_was_left_out_has_seen():
    center = Center(3, 0.9)
    center.observe(logits(torch.full((2, 1, 3), torch.nan)))
    center.update(~TAKEN)
    assert center.value.tolist() == [0, 0, 0]
    center.observe(logits(torch.ones(2, 1, 3)))
    center.update(TAKEN)
    torch.testing.assert_close(center.value, torch.full((3,), 0.1))


def test_assignment_tells_both_collapses_from_health(blocks):
    def of(probabilities):
        return assignment_stats(TeacherTargets(logits(probabilities.clamp(min=1e-30).log()), torch.zeros(16), 1.0))

    uniform = of(torch.full((2, 8, 16), 1 / 16))
    single = of(torch.eye(16)[[3] * 16].view(2, 8, 16))
    healthy = of(torch.eye(16).view(2, 8, 16))
    assert uniform.entropy.item() == pytest.approx(math.log(16), abs=1e-5)
    assert uniform.kl_to_uniform.item() == pytest.approx(0, abs=1e-5)
    assert uniform.information.item() == pytest.approx(0, abs=1e-5)
    assert single.entropy.item() == pytest.approx(0, abs=1e-5)
    assert single.information.item() == pytest.approx(0, abs=1e-5)
    assert healthy.information.item() == pytest.approx(math.log(16), abs=1e-5)


@pytest.mark.parametrize(("batch", "dim"), [(1, 4), (2, 3), (5, 8), (16, 32)])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_the_double_loop(batch, dim, temperature):
    generator = torch.Generator().manual_seed(batch)
    first, second = torch.randn(2, batch, dim, generator=generator).unbind()
    loss, _ = nt_xent(first, second, temperature=temperature)
    textbook = slow.nt_xent(first.double().numpy(), second.double().numpy(), temperature)
    assert loss.item() == pytest.approx(textbook, rel=1e-5, abs=1e-7)
    swapped, _ = nt_xent(second, first, temperature=temperature)
    assert swapped.item() == pytest.approx(loss.item())


def test_nt_xent_of_equal_embeddings_is_ln_of_the_others():
    loss, _ = nt_xent(torch.ones(72, 8), torch.ones(72, 8), temperature=0.5)
    assert loss.item() == pytest.approx(math.log(2 * 72 - 1), rel=1e-5)


def test_nt_xent_accuracy_finds_the_positives():
    apart = torch.eye(6)
    _, perfect = nt_xent(apart, apart, temperature=0.5)
    _, wrong = nt_xent(apart, apart.roll(1, 0), temperature=0.5)
    assert perfect.item() == 1
    assert wrong.item() == 0


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 1, 5, 3)])
def test_l1_equals_the_pixel_loop(shape):
    generator = torch.Generator().manual_seed(1)
    reconstruction, clean = torch.randn(2, *shape, generator=generator).unbind()
    mask = torch.rand(shape[0], 1, *shape[2:], generator=generator) < 0.4
    arrays = reconstruction.double().numpy(), clean.double().numpy()
    assert reconstruction_l1(reconstruction, clean).item() == pytest.approx(slow.l1(*arrays), rel=1e-5)
    assert reconstruction_l1(reconstruction, clean, mask).item() == pytest.approx(
        slow.l1(*arrays, mask.numpy()), rel=1e-5
    )
    assert reconstruction_l1(reconstruction, clean, torch.zeros_like(mask)).item() == 0


def test_uncertainty_weighting_is_version_1_1():
    """e^-s L + s/2 for cross-entropies, e^(-s/2) L + s/2 for the L1; s starts at 1."""
    losses = {"rotation": 1.2, "contrastive": 4.0, "reconstruction": 0.7}
    weights = UncertaintyWeights(list(losses))
    total = weights({name: torch.tensor(value) for name, value in losses.items()})
    textbook = math.exp(-1) * 1.2 + 0.5 + math.exp(-1) * 4.0 + 0.5 + math.exp(-0.5) * 0.7 + 0.5
    assert total.item() == pytest.approx(textbook)


def test_uncertainty_gradient_vanishes_at_the_optimum():
    """s* = ln 2L for the cross-entropies, 2 ln L for the L1."""
    losses = {"rotation": 1.2, "contrastive": 4.0, "reconstruction": 0.7}
    weights = UncertaintyWeights(list(losses))
    optimum = {"rotation": math.log(2.4), "contrastive": math.log(8.0), "reconstruction": 2 * math.log(0.7)}
    with torch.no_grad():
        for name, value in optimum.items():
            weights.s[name].fill_(value)
    weights({name: torch.tensor(value) for name, value in losses.items()}).backward()
    for parameter in weights.parameters():
        assert parameter.grad.item() == pytest.approx(0, abs=1e-6)


def test_uncertainty_weight_cannot_explode():
    weights = UncertaintyWeights(["rotation"])
    with torch.no_grad():
        weights.s["rotation"].fill_(-50)
    assert weights.weight("rotation").item() == pytest.approx(math.exp(4))


def test_fixed_weights_add_up():
    weights = FixedWeights({"rotation": 0.5, "reconstruction": 2.0})
    assert weights({"rotation": torch.tensor(3.0), "reconstruction": torch.tensor(1.0)}).item() == pytest.approx(3.5)
    assert not list(weights.parameters())
