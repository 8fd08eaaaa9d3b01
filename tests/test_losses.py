"""The losses equal their slow textbook forms, and behave as the papers say."""

import math

import numpy as np
import pytest
import torch
from reference import losses as slow

from ssl_vit.losses.contrastive import nt_xent
from ssl_vit.losses.dino import Center, assignment, dino_loss, sharpen
from ssl_vit.losses.reconstruction import l1
from ssl_vit.losses.weighting import FixedWeights, UncertaintyWeights

SIZES = [(2, 1, 3), (2, 4, 7), (4, 3, 16), (10, 2, 64)]  # views, batch, prototypes


@pytest.mark.parametrize(("views", "batch", "prototypes"), SIZES)
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_dino_loss_equals_the_double_loop(views, batch, prototypes, temperature):
    generator = torch.Generator().manual_seed(views * batch)
    student = torch.empty(views, batch, prototypes).uniform_(-1, 1, generator=generator)
    teacher = torch.empty(2, batch, prototypes).uniform_(-1, 1, generator=generator)
    center = torch.empty(prototypes).uniform_(-0.3, 0.3, generator=generator)
    loss = dino_loss(student, sharpen(teacher, center, temperature), temperature=0.1)
    textbook = slow.dino(student.double().numpy(), teacher.double().numpy(), center.double().numpy(), 0.1, temperature)
    assert loss.item() == pytest.approx(textbook, rel=1e-5)


def test_dino_loss_of_the_uniform_collapse_is_ln_k():
    for prototypes, plateau in [(1024, 6.9315), (4096, 8.3178), (65536, 11.0904)]:
        logits = torch.zeros(4, 2, prototypes)
        loss = dino_loss(logits, sharpen(logits[:2], torch.zeros(prototypes), 0.04), temperature=0.1)
        assert loss.item() == pytest.approx(plateau, abs=1e-3)


def test_dino_loss_never_compares_a_view_with_itself():
    """A student that is perfect on its own view and wrong on the other must not be rewarded."""
    teacher = torch.eye(2)[:, None] * 100  # view 0 is prototype 0, view 1 is prototype 1
    same = dino_loss(teacher, sharpen(teacher, torch.zeros(2), 1.0), temperature=1.0)
    crossed = dino_loss(teacher.flip(0), sharpen(teacher, torch.zeros(2), 1.0), temperature=1.0)
    assert same.item() == pytest.approx(100)
    assert crossed.item() == pytest.approx(0, abs=1e-6)


def test_dino_loss_is_exact_under_autocast_and_sends_no_gradient_to_the_teacher():
    student = torch.randn(4, 3, 32, requires_grad=True)
    teacher = torch.randn(2, 3, 32, requires_grad=True)
    plain = dino_loss(student, sharpen(teacher, torch.zeros(32), 0.05), temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = dino_loss(student, sharpen(teacher, torch.zeros(32), 0.05), temperature=0.1)
    assert mixed.item() == plain.item()
    mixed.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_center_is_the_running_mean_over_views_and_micro_batches():
    """Two micro-batches and one update equal one batch and one update; the official formula, step by step."""
    generator = torch.Generator().manual_seed(0)
    whole, split, textbook = Center(5, 0.9), Center(5, 0.9), np.zeros(5)
    for _ in range(4):
        logits = torch.randn(2, 6, 5, generator=generator)
        whole.observe(logits)
        split.observe(logits[:, :2])
        split.observe(logits[:, 2:])
        whole.update()
        split.update()
        textbook = 0.9 * textbook + 0.1 * logits.double().numpy().sum((0, 1)) / (2 * 6)
    np.testing.assert_allclose(whole.value, textbook, rtol=1e-5)
    np.testing.assert_allclose(split.value, whole.value, rtol=1e-5)


def test_center_travels_in_the_state_dict():
    center = Center(3, 0.9)
    center.observe(torch.ones(2, 1, 3))
    center.update()
    restored = Center(3, 0.9)
    restored.load_state_dict(center.state_dict())
    torch.testing.assert_close(restored.value, torch.full((3,), 0.1))


def test_assignment_tells_both_collapses_from_health():
    uniform = assignment(torch.full((2, 8, 16), 1 / 16))
    single = assignment(torch.eye(16)[[3] * 16].view(2, 8, 16))
    healthy = assignment(torch.eye(16).view(2, 8, 16))
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
    assert l1(reconstruction, clean).item() == pytest.approx(slow.l1(*arrays), rel=1e-5)
    assert l1(reconstruction, clean, mask).item() == pytest.approx(slow.l1(*arrays, mask.numpy()), rel=1e-5)
    assert l1(reconstruction, clean, torch.zeros_like(mask)).item() == 0


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
