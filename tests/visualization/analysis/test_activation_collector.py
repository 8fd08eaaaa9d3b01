"""Activation collector: statistics against loops over the unfused attention, batches, sizes."""

import pytest
import torch

from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.analysis import attention_statistics
from ssl_vit.visualization.analysis.activation_collector import ActivationCollector
from ssl_vit.visualization.analysis.feature_figures import OUTLIER
from tests.reference import analysis as slow

KINDS = {
    "class token": {},
    "registers": {"registers": 3},
    "no class token": {"name": "vit_medium_patch16_gap_256"},
    "registers, no class token": {"name": "vit_medium_patch16_gap_256", "registers": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_activation_collector_equals_loops_over_the_unfused_attention(make_model, make_crops, collect, kind):
    model, crops = make_model(**KINDS[kind]), make_crops()
    collector, _, found = collect(model, crops)
    prefix = model.backbone.num_prefix_tokens
    assert prefix == {"class token": 1, "registers": 4, "no class token": 0, "registers, no class token": 2}[kind]
    matrices = slow.unfused_attention(model.backbone, collector.transform.normalize(crops))
    assert len(matrices) == 3
    for block, matrix in enumerate(matrices):
        for image in range(2):
            rows = [slow.patch_attention(matrix[image, head], prefix) for head in range(3)]
            for head in range(3):
                others = [slow.cosine(rows[head], rows[other]) for other in range(3) if other != head]
                index = image, block, head
                assert found.heads.distance[index] == pytest.approx(slow.distance(rows[head], 4, 8), rel=1e-5)
                assert found.heads.entropy[index] == pytest.approx(slow.entropy(rows[head]), rel=1e-5)
                assert found.heads.diversity[index] == pytest.approx(1 - sum(others) / 2, abs=1e-5)
                torch.testing.assert_close(found.heads.prefix[index], matrix[image, head, prefix:, :prefix].mean(0))


@pytest.mark.parametrize("registers", [0, 3])
def test_attention_rollout_equals_the_loops(make_model, make_crops, collect, registers):
    model, crops = make_model(registers=registers), make_crops()
    collector, _, found = collect(model, crops)
    matrices = slow.unfused_attention(model.backbone, collector.transform.normalize(crops))
    for image, example in enumerate(found.examples):
        expected = slow.rollout([matrix[image] for matrix in matrices], 1 + registers)
        torch.testing.assert_close(example.rollout.flatten().double(), expected, atol=1e-6, rtol=0)
        last = matrices[-1][image].mean(0)[0, 1 + registers :]
        assert example.last.sum() == pytest.approx(1, abs=1e-5)
        assert torch.corrcoef(torch.stack([example.last.flatten(), last]))[0, 1] > 0.95


def test_activation_collector_is_independent_of_the_number_of_rows_in_memory(
    make_model, make_crops, collect, monkeypatch
):
    model, crops = make_model(registers=2), make_crops()
    _, _, whole = collect(model, crops)
    monkeypatch.setattr(attention_statistics, "MAX_WEIGHTS", 500)  # 4 rows of 2 images and 3 heads at a time
    _, _, pieces = collect(model, crops)
    for one, other in zip(whole.heads, pieces.heads, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole.examples[1].rollout, pieces.examples[1].rollout)


def test_activation_collector_is_independent_of_the_batch_size(make_model, make_crops, collect):
    model, crops = make_model(), make_crops(5)
    _, layers, whole = collect(model, crops)
    collector = ActivationCollector(model, None)
    parts = [collector.update(crops[:1], num_examples=2), collector.update(crops[1:], num_examples=1)]
    found = collector.compute()
    assert len(found.examples) == 2
    torch.testing.assert_close(found.examples[1].rollout, whole.examples[1].rollout)
    torch.testing.assert_close(found.heads.distance, whole.heads.distance)
    torch.testing.assert_close(found.norms.levels, whole.norms.levels)
    torch.testing.assert_close(found.features, whole.features)
    for one, *rest in zip(layers, *parts, strict=True):
        torch.testing.assert_close(one, torch.cat(rest))


def test_activation_collector_locates_a_high_norm_token(make_model, make_crops, collect):
    model = make_model()
    model.backbone.vit.pos_embed.data[0, 1 + 6] *= 3000  # the seventh patch of every image
    _, _, found = collect(model, make_crops(3))
    torch.testing.assert_close(found.norms.outliers, torch.full((3, 3), 1 / 16))
    for example in found.examples:
        assert example.norms[1].argmax() == 6
        assert example.norms[1].max() > OUTLIER * example.norms[1].median()


@pytest.mark.parametrize("size", [16, 48])
def test_activation_collector_takes_other_image_sizes(make_model, make_crops, collect, size):
    _, _, found = collect(make_model(), make_crops(2, size), image_size=size)
    assert found.examples[0].rollout.shape == (size // 8, size // 8)
    assert found.heads.distance.isfinite().all()


@pytest.mark.parametrize("size", [8, 30, 4])
def test_activation_collector_rejects_sizes_without_a_grid_of_patches(make_model, size):
    with pytest.raises(UserError, match=f"image_size={size}.*multiple"):
        ActivationCollector(make_model(), size)
