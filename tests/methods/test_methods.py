"""DINO and SiT step as the papers say: who is decayed, clipped, frozen, averaged, and with what."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from ssl_vit.data.batch import Batch
from ssl_vit.methods.base import stack_views
from ssl_vit.methods.gradient_clipping import clip_grad_per_parameter
from ssl_vit.methods.heads import DINOHead, Prototypes, ReconstructionHead
from ssl_vit.methods.schedules import make_plan
from ssl_vit.models.ema import init_teacher, update_ema
from ssl_vit.runtime.distributed import norms
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.training.trainer import build_method


@pytest.fixture
def build(pretrain_config):
    def method(*words):
        config = pretrain_config(*words)
        return build_method(config, make_plan(config, num_images=192))

    return method


def batch_of(views, count=4):
    """Random crops as the loader gives them."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(count)

    def crops(config):
        shape = (count, config.count, 3, config.size, config.size)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return Batch(crops(views.global_crops), crops(views.local_crops), index % 2, index, sample_keys(0, 0, index))


def stepped(method, batch):
    """One step of the method on float views, without a Trainer."""
    global_views = method.color_augmentation(batch.global_views, batch.key)
    local_views = method.color_augmentation(batch.local_views, batch.key, first_view=2)
    return method.step(global_views, local_views, batch)


def dense(logits):
    """All logits (N, K)."""
    return logits.block(slice(None))


@pytest.fixture(autouse=True)
def at_step_zero(monkeypatch):
    from ssl_vit.methods.base import SSLMethod

    monkeypatch.setattr(SSLMethod, "global_step", property(lambda self: 0))
    monkeypatch.setattr(SSLMethod, "global_rank", property(lambda self: 0))


# --- parts -----------------------------------------------------------------------------------------------------


def test_clip_grad_per_parameter_equals_dinos_loop():
    """The official loop: every tensor's own norm against the limit."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n, 3)) for n in (1, 4, 50)]
    for parameter, scale in zip(parameters, (0.1, 5.0, 1.0), strict=True):
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    expected = []
    for parameter in parameters:
        coefficient = 3.0 / (parameter.grad.norm(2) + 1e-6)
        expected.append(parameter.grad * coefficient if coefficient < 1 else parameter.grad.clone())
    gradients = [parameter.grad for parameter in parameters]
    clip_grad_per_parameter(gradients, norms(gradients), 3.0)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


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


def test_prototypes_equal_weight_norm():
    """Old-style weight normalization with g = 1: the official last layer, without its trouble with deepcopy."""
    torch.manual_seed(0)
    ours = Prototypes(8, 5, norm_last_layer=False)
    linear = torch.nn.Linear(8, 5, bias=False)
    linear.weight.data.copy_(ours.weight_v.data)
    official = torch.nn.utils.parametrizations.weight_norm(linear)
    official.parametrizations.weight.original0.data.fill_(1)
    z = torch.randn(3, 8)
    torch.testing.assert_close(dense(ours(z)), official(z))
    torch.testing.assert_close(dense(copy.deepcopy(ours)(z)), official(z))


def test_dino_head_has_the_official_names_and_returns_cosines():
    head = DINOHead(16, prototypes=7, hidden_dim=12, bottleneck_dim=4, layers=3, norm_last_layer=True)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (12, 16),
        "mlp.0.bias": (12,),
        "mlp.2.weight": (12, 12),
        "mlp.2.bias": (12,),
        "mlp.4.weight": (4, 12),
        "mlp.4.bias": (4,),
        "last_layer.weight_v": (7, 4),
        "last_layer.weight_g": (7, 1),
    }
    assert dense(head(torch.randn(50, 16))).abs().max() <= 1 + 1e-6
    assert not head.last_layer.weight_g.requires_grad


def test_reconstruction_head_is_a_linear_layer_per_patch():
    head = ReconstructionHead(6, patch_size=4, in_chans=3)
    tokens = torch.randn(2, 2 * 3, 6)
    images = head(tokens, (2, 3))
    assert images.shape == (2, 3, 8, 12)
    weight = head.deconvolution.weight.flatten(1)  # (D, C·P·P)
    bias = head.deconvolution.bias.repeat_interleave(16)
    for row, column in itertools.product(range(2), range(3)):
        patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        torch.testing.assert_close(patch, tokens[:, 3 * row + column] @ weight + bias)


def test_stack_views_orders_by_view():
    views = torch.arange(6).view(3, 2, 1, 1, 1)  # image, view
    assert stack_views(views).flatten().tolist() == [0, 2, 4, 1, 3, 5]


# --- DINO ------------------------------------------------------------------------------------------------------


def test_dino_has_weight_decay_as_the_official_code(build):
    """No decay on biases and one-dimensional parameters; positions, tokens and prototypes do decay."""
    method = build("method.head.norm_last_layer=false")
    decayed = {n for n, p in method.student.named_parameters() if p.requires_grad and method.has_weight_decay(n, p)}
    official = {n for n, p in method.student.named_parameters() if not (n.endswith(".bias") or p.ndim == 1)}
    assert decayed == official
    assert {"backbone.vit.pos_embed", "backbone.vit.cls_token", "head.last_layer.weight_g"} <= decayed
    optimizer = method.configure_optimizers()
    assert [group["decays"] for group in optimizer.param_groups] == [True, False]
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in method.student.parameters() if p.requires_grad}


def test_dino_teacher_is_a_frozen_copy_without_drop_path(build):
    method = build("backbone.drop_path=0.3")
    for ours, theirs in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
        assert not ours.requires_grad
    assert method.student.backbone.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    method.train()
    batch = batch_of(method.config.views)
    images = stack_views(method.color_augmentation(batch.global_views, batch.key))
    torch.testing.assert_close(method.teacher(images)[0], method.teacher(images)[0], rtol=0, atol=0)


def test_dino_step_equals_the_algorithm_written_out(build):
    """Student on all views, teacher on the global ones, the previous center, pairs of different views."""
    from tests.reference import losses as slow

    method = build()
    with torch.no_grad():
        method.center.value.uniform_(-0.2, 0.2)
    center = method.center.value.clone()
    batch = batch_of(method.config.views)
    global_views = method.color_augmentation(batch.global_views, batch.key)
    local_views = method.color_augmentation(batch.local_views, batch.key, first_view=2)
    result = method.step(global_views, local_views, batch)
    views = [*global_views.unbind(1), *local_views.unbind(1)]
    with torch.no_grad():
        student = np.stack([dense(method.student(view)[0]).double().numpy() for view in views])
        teacher = np.stack([dense(method.teacher(view)[0]).double().numpy() for view in views[:2]])
    textbook = slow.dino(student, teacher, center.double().numpy(), 0.1, 0.04)
    assert result.loss.item() == pytest.approx(textbook, rel=1e-4)
    with torch.no_grad():
        for view, features in zip(views, result.features, strict=False):  # of the teacher, by global view
            torch.testing.assert_close(features, method.teacher(view)[1], rtol=1e-4, atol=1e-5)
    assert result.features.shape == (2, 4, 32)
    assert torch.equal(method.center.value, center)  # moves only after the optimizer step
    method.after_optimizer_step(0, torch.tensor(True))
    expected = 0.9 * center.double().numpy() + 0.1 * teacher.mean((0, 1))
    np.testing.assert_allclose(method.center.value, expected, rtol=1e-4, atol=1e-6)


def test_dino_last_layer_is_constant_while_frozen(build):
    for steps, frozen in (("0steps", False), ("5steps", True)):
        method = build(f"method.freeze_last_layer={steps}")
        stepped(method, batch_of(method.config.views)).loss.backward()
        method.on_before_optimizer_step(None)
        assert (method.student.head.last_layer.weight_v.grad is None) == frozen
        assert method.student.head.mlp[0].weight.grad is not None
        assert method.student.head.last_layer.weight_v.requires_grad


def test_dino_without_local_crops(build):
    method = build("method.views.local_crops.count=0")
    loss = stepped(method, batch_of(method.config.views)).loss
    assert 0 < loss.item() < 2 * np.log(64)


def test_dino_gives_every_trained_parameter_a_gradient(build):
    """DDP hangs otherwise."""
    for words in ((), ("method=sit",), ("method=sit", "method.tokens=shared")):
        method = build(*words)
        stepped(method, batch_of(method.config.views)).loss.backward()
        without = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, words


# --- SiT -------------------------------------------------------------------------------------------------------

SUBSETS = [on for r in (1, 2, 3) for on in itertools.combinations(("rotation", "contrastive", "reconstruction"), r)]


@pytest.mark.parametrize("on", SUBSETS, ids="+".join)
@pytest.mark.parametrize("weighting", ["uncertainty", "fixed"])
def test_sit_trains_on_any_subset_of_losses(build, on, weighting):
    """A loss that is off creates no head, no weight and no token."""
    off = [name for name in ("rotation", "contrastive", "reconstruction") if name not in on]
    method = build("method=sit", f"method.weighting={weighting}", *(f"method.{name}.enabled=false" for name in off))
    assert set(method.student.heads) == set(on)
    assert method.eval_backbone.config.reg_tokens == int("rotation" in on)
    assert len(list(method.weights.parameters())) == (len(on) if weighting == "uncertainty" else 0)
    result = stepped(method, batch_of(method.config.views))
    result.loss.backward()
    assert result.loss.isfinite()
    assert set(on) <= result.logs.keys()
    assert not any(name in result.logs for name in off)


def test_sit_shared_tokens_load_into_a_vanilla_vit(build):
    method = build("method=sit", "method.tokens=shared")
    assert method.eval_backbone.config.reg_tokens == 0


def test_sit_has_no_weight_decay_on_tokens_positions_and_loss_weights(build):
    method = build("method=sit")
    decayed = {name for name, parameter in method.named_parameters() if method.has_weight_decay(name, parameter)}
    undecayed = {name for name, _ in method.named_parameters()} - decayed
    for name in ("pos_embed", "cls_token", "reg_token"):
        assert f"student.backbone.vit.{name}" in undecayed
    assert {"weights.s.rotation", "weights.s.contrastive", "weights.s.reconstruction"} <= undecayed
    assert "student.backbone.vit.patch_embed.proj.weight" in decayed


def test_sit_target_is_the_rotated_view_and_input_the_corrupted_one(build, monkeypatch):
    method = build("method=sit")
    batch = batch_of(method.config.views)
    views = method.color_augmentation(batch.global_views, batch.key)
    clean, quarter = method.rotated(views, batch.key)
    for image, original, turns in zip(clean, stack_views(views), quarter.tolist(), strict=True):
        torch.testing.assert_close(image, torch.rot90(original, -turns, (1, 2)))  # clockwise
    corrupted, mask = method.corrupted(clean, batch.key)
    assert corrupted.shape == clean.shape
    assert mask.shape == (len(clean), 1, *clean.shape[2:])
    assert 0.05 < mask.float().mean() < 0.5
    seen = []
    forward = method.student.forward
    monkeypatch.setattr(method.student, "forward", lambda images, key: seen.append(images) or forward(images, key))
    method.step(views, views[:, :0], batch)
    torch.testing.assert_close(seen[0], corrupted)


def test_sit_rotations_are_balanced_and_independent_between_views(build):
    method = build("method=sit")
    keys = sample_keys(0, 0, torch.arange(4000))
    _, quarter = method.rotated(torch.zeros(4000, 2, 1, 1, 1), keys)
    first, second = quarter.chunk(2)
    joint = torch.bincount(4 * first + second, minlength=16) / 4000
    assert (joint - 1 / 16).abs().max() < 0.02


def test_sit_overfits_a_few_images(build):
    """Rotation is learned and the reconstruction gets better: the three heads are wired to the right tokens."""
    method = build("method=sit", "backbone.embed_dim=64", "method.views.jitter.p=0.0")
    batch = batch_of(method.config.views, count=8)
    smooth = torch.nn.functional.interpolate(batch.global_views.flatten(0, 1)[:, :, :3, :3].float(), (48, 48))
    batch = batch._replace(global_views=smooth.to(torch.uint8).unflatten(0, (8, 2)))
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for _ in range(120):
        result = stepped(method, batch)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append({name: float(value) for name, value in result.logs.items()})
    assert losses[-1]["reconstruction"] < 0.7 * losses[0]["reconstruction"]
    assert np.mean([row["rotation_accuracy"] for row in losses[-10:]]) > 0.8
    assert np.mean([row["contrastive"] for row in losses[-10:]]) < losses[0]["contrastive"]


def test_sit_noise_differs_between_the_micro_batches_of_a_step(build):
    method = build("method=sit")
    clean = torch.zeros(8, 3, 48, 48)
    keys = sample_keys(0, 0, torch.arange(8))
    (first, _), (again, _), (other, _) = (method.corrupted(clean, key) for key in (keys[:4], keys[:4], keys[4:]))
    assert torch.equal(first, again)
    noisy = (first != 0) & (other != 0)
    assert noisy.sum() > 100
    assert (first == other)[noisy].float().mean() < 0.01


def test_configure_gradient_clipping_uses_unscaled_gradients(build):
    """In 16-mixed the gradients arrive multiplied by the loss scale, which fused AdamW takes out after clipping."""
    method = build("method.optimizer.grad_clip=1.0")
    optimizer = method.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameter = optimizer.param_groups[0]["params"][0]
    (scaler.scale(parameter.flatten()[0] * 0.5)).backward()
    method._trainer = SimpleNamespace(precision_plugin=MixedPrecision("16-mixed", "cpu", scaler))
    method.configure_gradient_clipping(optimizer)
    assert parameter.grad.norm().item() == pytest.approx(0.5)
    scaler.step(optimizer)


def test_dino_head_normalizes_in_float32_under_autocast():
    head = DINOHead(64, prototypes=8, hidden_dim=32, bottleneck_dim=256, layers=3, norm_last_layer=True)
    seen = []
    head.last_layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        head(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(seen[0].norm(dim=-1), torch.ones(100), rtol=0, atol=1e-5)


# --- speed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dino", "sit"])
def test_training_step_never_waits_for_the_gpu(build, monkeypatch, name):
    """From the batch to the update of the teacher the CPU may run ahead of the GPU."""
    from ssl_vit.methods.base import SSLMethod
    from tests.reference.fake_gpu import FakeGPU

    monkeypatch.setattr(SSLMethod, "should_log", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(record_event=lambda *_: None))
    method = build(f"method={name}")
    method.timer = SimpleNamespace(mark=lambda phase: None)
    batch = batch_of(method.config.views)
    with FakeGPU():
        method._apply(lambda tensor: tensor.to("cuda", non_blocking=True))
        crops = {
            views: getattr(batch, views).to("cuda", non_blocking=True) for views in ("global_views", "local_views")
        }
        optimizer = method.configure_optimizers()
        loss = method.training_step(batch._replace(**crops), 0)
        assert loss.device.type == "cuda"
        if name == "dino":
            loss.grad_fn.apply(torch.ones((), device="cuda"))  # the loss's own backward; the engine itself needs a GPU
        for parameter in method.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        method._trainer = SimpleNamespace(precision_plugin=None)
        method.on_before_optimizer_step(optimizer)
        method.configure_gradient_clipping(optimizer)
        optimizer.step()
        method.after_optimizer_step(0, method.check.applied)
