"""Linear CKA: against loops, its invariances, and its figures."""

import pytest
import torch

from ssl_vit.visualization.analysis.cka import LinearCKA, comparison_figure, layers_figure
from tests.reference import analysis as slow


def test_cka_equals_the_loops_over_quadruples():
    torch.manual_seed(0)
    x = torch.randn(13, 5, dtype=torch.float64) + 3
    y = torch.cat([x[:, :2], torch.randn(13, 9, dtype=torch.float64)], dim=1)
    for size in (256, 9, 5, 6):  # one minibatch; a rest of 4; a rest of 3, which is skipped; a rest of 1
        cka = LinearCKA(size)
        for start, end in ((0, 1), (1, 8), (8, 13)):
            cka.update([x[start:end], y[start:end]])
        assert cka.compute()[0, 1] == pytest.approx(slow.minibatch_cka(x, y, size), abs=1e-6)


def test_cka_is_invariant_to_rotation_scale_and_shift():
    torch.manual_seed(0)
    x, y = torch.randn(40, 12), torch.randn(40, 30)
    y[:, :12] += x
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    cka = LinearCKA()
    cka.update([x, 7 * x @ rotation + 5, y])
    found = cka.compute()
    torch.testing.assert_close(found.diagonal(), torch.ones(3))
    assert found[0, 1] == pytest.approx(1, abs=1e-5)
    assert found[1, 2] == pytest.approx(float(found[0, 2]), abs=1e-5)
    assert 0.2 < found[0, 2] < 0.9


def test_cka_of_minibatches_has_no_bias():
    torch.manual_seed(0)
    shared = torch.randn(2048, 20)
    x, y = (torch.cat([shared, torch.randn(2048, 60)], dim=1) for _ in range(2))
    noise = torch.randn(2048, 300)  # of more dimensions than images in a minibatch
    found = {}
    for size in (2048, 128):
        cka = LinearCKA(size)
        for part in zip(*(features.split(100) for features in (x, y, noise)), strict=True):
            cka.update(list(part))
        found[size] = cka.compute()
    torch.testing.assert_close(found[128], found[2048], atol=0.02, rtol=0)
    assert abs(found[128][0, 2]) < 0.02  # the biased estimate would be above 0.5


def test_cka_reports_too_few_images_and_constant_layers():
    cka = LinearCKA()
    assert cka.compute() is None
    cka.update([torch.randn(3, 4)])
    assert cka.compute() is None
    cka.update([torch.randn(1, 4)])
    assert cka.compute() is not None
    cka = LinearCKA()
    cka.update([torch.randn(6, 4), torch.ones(6, 4)])
    assert cka.compute()[0].isnan().tolist() == [False, True]


def test_figures_draw_matrices_of_any_depth():
    for shape in ((1, 1), (3, 12), (24, 24)):
        similarity = torch.rand(shape)
        similarity[0, 0] = torch.nan
        images = comparison_figure(similarity, "other", 16).image, layers_figure(similarity, None, 9).image
        assert images[0].size == images[1].size
