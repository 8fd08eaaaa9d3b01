"""Position embeddings and patch filters: against NumPy, and their figures."""

import numpy as np
import pytest
import torch

from ssl_vit.visualization.analysis.weight_figures import (
    filter_components,
    filter_figure,
    position_figure,
    position_similarity,
)


@pytest.mark.parametrize("shape", [(48, 3, 8, 8), (20, 3, 4, 4), (30, 1, 2, 2)])
def test_filter_components_equal_numpy(shape):
    weight = torch.randn(*shape, generator=torch.manual_seed(0)) * torch.linspace(0.1, 2, shape[-1])
    found = filter_components(weight)
    points = weight.flatten(1).double().numpy()
    _, strengths, components = np.linalg.svd(points - points.mean(0), full_matrices=False)
    assert found.explained.numpy() == pytest.approx(strengths**2 / (strengths**2).sum(), abs=1e-6)
    count = min(28, *points.shape)
    assert found.filters.shape == (count, *shape[1:])
    filters = found.filters.flatten(1).numpy()
    for index in range(min(count, 20) - 1):
        assert abs(filters[index] @ components[index]) == pytest.approx(1, abs=1e-4)
        assert filters[index][np.abs(filters[index]).argmax()] > 0
    assert filter_figure({"model": found, "random init": found}).image.width == 1400


def test_position_similarity_excludes_class_token_and_registers(make_model):
    for registers in (0, 4):
        backbone = make_model(registers=registers).backbone
        rows = torch.randn(4, 48)
        backbone.vit.pos_embed.data[0, -16:] = rows.repeat_interleave(4, 0)  # the same along each row
        backbone.vit.pos_embed.data[0, :-16] = 100
        similarity = position_similarity(backbone)
        assert similarity.shape == (4, 4, 4, 4)
        expected = torch.nn.functional.cosine_similarity(rows[:, None], rows, dim=-1)
        torch.testing.assert_close(similarity[:, 0, :, 3], expected)
        torch.testing.assert_close(similarity[2, :, 2], torch.ones(4, 4))
    backbone.vit.pos_embed = None
    assert position_similarity(backbone) is None


def test_position_figure_shows_some_positions_of_a_fine_grid():
    figure = position_figure(torch.rand(40, 30, 40, 30))
    assert "of the 40 x 30, 14 x 14 are shown" in figure.text
    assert figure.image.width == 1400
