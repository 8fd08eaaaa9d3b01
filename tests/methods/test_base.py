"""What all methods share: views, gradients, clipping, and no waiting for the GPU."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from ssl_vit.methods.base import stack_views
from tests.helpers.methods import batch_of, run_step


def test_stack_views_orders_by_view():
    views = torch.arange(6).view(3, 2, 1, 1, 1)  # image, view
    assert stack_views(views).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_step_gives_every_trained_parameter_a_gradient(build):
    """DDP hangs otherwise."""
    for words in ((), ("method=sit",), ("method=sit", "method.tokens=shared")):
        method = build(*words)
        run_step(method, batch_of(method.config.views)).loss.backward()
        without = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, words


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
