"""Statistics of the attention heads: against the unfused attention, and of known attention."""

import pytest
import torch

from ssl_vit.models.attention_maps import capture_qk
from ssl_vit.visualization.analysis.attention_statistics import (
    attention_rows,
    head_statistics,
    patch_centers,
    uniform_distance,
)
from tests.reference import analysis as slow


@pytest.mark.parametrize("registers", [0, 3])
def test_attention_rows_equal_the_unfused_attention(make_model, registers):
    model = make_model(registers=registers)
    images = torch.randn(2, 3, 24, 40)
    found = []

    def visit(_block, queries, keys):
        found.append(torch.cat([weights for _, weights in attention_rows(queries, keys)], dim=2))

    with capture_qk(model.backbone, visit, blocks=range(3)):
        model.backbone.tokens(images)
    for rows, matrix in zip(found, slow.unfused_attention(model.backbone, images), strict=True):
        torch.testing.assert_close(rows, matrix, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("grid", "patch", "pixels"), [((14, 14), 16, 116.5), ((8, 8), 4, 16.5), ((30, 30), 16, 250), ((60, 60), 8, 250)]
)
def test_uniform_distance_and_statistics_of_uniform_attention(grid, patch, pixels):
    centers = patch_centers(grid, patch)
    assert uniform_distance(centers) == pytest.approx(pixels, abs=0.8)
    assert uniform_distance(centers) == pytest.approx(0.520 * grid[0] * patch, rel=0.01)
    if grid[0] <= 14:
        assert uniform_distance(centers) == pytest.approx(pixels, abs=0.05)
        tokens = 1 + len(centers)
        equal = torch.zeros(1, 2, tokens, 4)  # equal logits: uniform attention
        found = head_statistics(equal, equal, prefix=1, centers=centers)
        torch.testing.assert_close(found.distance, torch.full((1, 2), uniform_distance(centers)))
        torch.testing.assert_close(found.entropy, torch.ones(1, 2))
        torch.testing.assert_close(found.prefix, torch.full((1, 2, 1), 1 / tokens))
        torch.testing.assert_close(found.diversity, torch.zeros(1, 2), atol=1e-5, rtol=0)


def test_head_statistics_of_a_single_head_that_attends_to_itself():
    eye = 100 * torch.eye(10)[None, None]
    found = head_statistics(eye, eye, prefix=1, centers=patch_centers((3, 3), 16))
    assert found.distance.item() == pytest.approx(0, abs=1e-4)
    assert found.entropy.item() == pytest.approx(0, abs=1e-4)
    assert found.diversity.isnan()  # there is no other head
