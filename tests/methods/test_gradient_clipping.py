"""Clipping of gradients per parameter."""

import torch

from ssl_vit.methods.gradient_clipping import clip_grad_per_parameter
from ssl_vit.runtime.distributed import norms


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
