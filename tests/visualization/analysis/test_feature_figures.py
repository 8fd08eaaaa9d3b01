"""Token norms and singular spectrum of known features."""

import pytest
import torch

from ssl_vit.visualization.analysis.feature_figures import (
    block_of_largest_norm,
    norms_figure,
    spectrum,
    spectrum_figure,
    token_norms,
)


def test_token_norms_find_a_high_norm_token(make_crops):
    torch.manual_seed(0)
    norms = torch.rand(5, 3, 16) + 10
    norms[2, 1, 7] = 60
    found = token_norms(norms)
    expected = torch.zeros(5, 3)
    expected[2, 1] = 1 / 16
    torch.testing.assert_close(found.outliers, expected)
    torch.testing.assert_close(found.levels[..., -1], norms.amax(-1))
    torch.testing.assert_close(found.levels[..., 1], norms.quantile(0.5, dim=-1))
    assert block_of_largest_norm(found) == 1
    maps = [(make_crops(1)[0], norms[image, 1].view(4, 4)) for image in range(4)]
    figure = norms_figure({"model": found}, maps, 1)
    assert "0.00" not in figure.text
    assert f"{100 / 80:.2f} % at most, after block 1" in figure.text


def test_spectrum_of_known_features():
    x = torch.linalg.qr(torch.randn(50, 8, generator=torch.manual_seed(0))).Q  # eight equal singular values
    found = spectrum(x)
    assert found.rank == pytest.approx(8, rel=1e-4)
    torch.testing.assert_close(found.shares, torch.full((8,), 1 / 8))
    collapsed = spectrum(torch.ones(50, 8))
    assert collapsed.rank == pytest.approx(1, abs=1e-3)
    figure = spectrum_figure({"model": collapsed, "random init": found}, features="[CLS] tokens", num_images=50)
    assert "(1.0 here, at most 8)" in figure.text
