"""DINO against the official code and the algorithm of the paper."""

import numpy as np
import pytest
import torch

from ssl_vit.methods.base import stack_views
from tests.helpers.methods import batch_of, dense, run_step


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
            torch.testing.assert_close(features, method.teacher(view)[1].cls, rtol=1e-4, atol=1e-5)
    assert result.features.shape == (2, 4, 32)
    assert torch.equal(method.center.value, center)  # moves only after the optimizer step
    method.after_optimizer_step(0, torch.tensor(True))
    expected = 0.9 * center.double().numpy() + 0.1 * teacher.mean((0, 1))
    np.testing.assert_allclose(method.center.value, expected, rtol=1e-4, atol=1e-6)


def test_dino_last_layer_is_constant_while_frozen(build):
    for steps, frozen in (("0steps", False), ("5steps", True)):
        method = build(f"method.freeze_last_layer={steps}")
        run_step(method, batch_of(method.config.views)).loss.backward()
        method.on_before_optimizer_step(None)
        assert (method.student.head.last_layer.weight_v.grad is None) == frozen
        assert method.student.head.mlp[0].weight.grad is not None
        assert method.student.head.last_layer.weight_v.requires_grad


def test_dino_without_local_crops(build):
    method = build("method.views.local_crops.count=0")
    loss = run_step(method, batch_of(method.config.views)).loss
    assert 0 < loss.item() < 2 * np.log(64)
