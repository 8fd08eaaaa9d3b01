"""Anchor losses against slow forms, and 0 where nothing has changed."""

import numpy as np
import pytest
import torch

from ssl_vit.losses.anchors import feature_loss, gram_loss, l2sp_loss


def slow_gram(x, y):
    """The mean over images and pairs of patches of the squared difference of their cosines."""
    cosine = lambda a, b: a @ b / (np.linalg.norm(a) * np.linalg.norm(b))  # noqa: E731
    images, count, _ = x.shape
    squares = [
        (cosine(x[i, n], x[i, m]) - cosine(y[i, n], y[i, m])) ** 2
        for i in range(images)
        for n in range(count)
        for m in range(count)
    ]
    return np.mean(squares)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 4), (3, 4, 8)])
def test_gram_loss_is_the_mean_squared_difference_of_cosines(shape):
    torch.manual_seed(sum(shape))
    x, y = torch.randn(2, *shape).unbind()
    assert gram_loss(x, y) == pytest.approx(slow_gram(x.double().numpy(), y.double().numpy()), abs=1e-6)
    assert gram_loss(x, 3 * x) == pytest.approx(0, abs=1e-12)  # lengths do not count


def test_gram_loss_does_not_change_with_a_rotation_of_all_patches():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    assert gram_loss(x @ rotation, x) == pytest.approx(0, abs=1e-12)
    assert feature_loss(x[:, 0] @ rotation, x @ rotation, x[:, 0], x) > 0.1


def test_feature_loss_is_the_mean_of_both_cosine_distances():
    torch.manual_seed(0)
    cls, start_cls = torch.randn(2, 3, 4).unbind()
    patches, start_patches = torch.randn(2, 3, 5, 4).unbind()
    cosine = lambda a, b: ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()  # noqa: E731
    expected = 1 - (cosine(cls, start_cls) + cosine(patches, start_patches)) / 2
    assert feature_loss(cls, patches, start_cls, start_patches) == pytest.approx(float(expected), abs=1e-6)
    assert feature_loss(cls, patches, 2 * cls, patches) == pytest.approx(0, abs=1e-6)


def test_l2sp_loss_and_its_gradient_are_those_of_half_the_squared_distance():
    torch.manual_seed(0)
    weights = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    start = [torch.randn(3, 2), torch.randn(4)]
    loss = l2sp_loss(weights, start)
    loss.backward()
    squares = sum(float(((w.detach() - s) ** 2).sum()) for w, s in zip(weights, start, strict=True))
    assert loss.item() == pytest.approx(squares / 2, rel=1e-6)
    for weight, value in zip(weights, start, strict=True):
        torch.testing.assert_close(weight.grad, weight.detach() - value)
