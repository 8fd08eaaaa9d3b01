"""Attention statistics, rollout, CKA, filters, positions and norms: against textbook loops, and their properties."""

import numpy as np
import pytest
import torch

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.attention_maps import capture_qk
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.analysis import head_statistics as heads_module
from ssl_vit.visualization.analysis.activation_collector import Observer
from ssl_vit.visualization.analysis.attention_rollout import Rolled, rollout_panel
from ssl_vit.visualization.analysis.cka import LinearCKA, layers_panel, versus_panel
from ssl_vit.visualization.analysis.feature_spectrum import spectrum, spectrum_panel
from ssl_vit.visualization.analysis.head_statistics import (
    attention_rows,
    head_statistics,
    patch_centers,
    uniform_distance,
)
from ssl_vit.visualization.analysis.patch_filters import filter_components, filter_panel
from ssl_vit.visualization.analysis.position_embeddings import position_panel, position_similarity
from ssl_vit.visualization.analysis.token_norms import OUTLIER, NormMap, norms_panel, token_norms, worst_block
from tests.reference import inspection as slow


def make_model(*, registers=0, name="vit_tiny_patch16_224", heads=3, size=32, in_chans=3) -> LoadedBackbone:
    """A small model whose attention is far from uniform."""
    sizes = {"img_size": size, "patch_size": 8, "in_chans": in_chans, "embed_dim": 48, "depth": 3, "num_heads": heads}
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(name=name, reg_tokens=registers, drop_path=0.0, init="jax", **sizes))
    for block in backbone.vit.blocks:
        block.attn.qkv.weight.data *= 2
    for token in (backbone.vit.cls_token, backbone.vit.reg_token):
        if token is not None:
            torch.nn.init.normal_(token)
    return LoadedBackbone(
        backbone.requires_grad_(False).eval(), [0.5] * in_chans, [0.5] * in_chans, "a test", None, None
    )


def make_crops(count=2, size=32, channels=3):
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.manual_seed(1)).to(torch.uint8)


def observe(model, crops, *, drawn=2, image_size=None):
    observer = Observer(model, image_size)
    layers = observer.see(crops, drawn=drawn)
    return observer, layers, observer.observation()


KINDS = {
    "class token": {},
    "registers": {"registers": 3},
    "no class token": {"name": "vit_medium_patch16_gap_256"},
    "registers, no class token": {"name": "vit_medium_patch16_gap_256", "registers": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_all_blocks_equal_loops_over_the_unfused_softmax(kind):
    model, crops = make_model(**KINDS[kind]), make_crops()
    observer, _, seen = observe(model, crops)
    vit = model.backbone.vit
    prefix = vit.num_prefix_tokens
    assert prefix == {"class token": 1, "registers": 4, "no class token": 0, "registers, no class token": 2}[kind]
    matrices = slow.unfused_attention(model.backbone, observer.cut.normalize(crops))
    assert len(matrices) == 3
    for block, matrix in enumerate(matrices):
        for picture in range(2):
            rows = [slow.among_patches(matrix[picture, head], prefix) for head in range(3)]
            for head in range(3):
                others = [slow.cosine(rows[head], rows[other]) for other in range(3) if other != head]
                place = picture, block, head
                assert seen.heads.distance[place] == pytest.approx(slow.distance(rows[head], 4, 8), rel=1e-5)
                assert seen.heads.entropy[place] == pytest.approx(slow.entropy(rows[head]), rel=1e-5)
                assert seen.heads.diversity[place] == pytest.approx(1 - sum(others) / 2, abs=1e-5)
                masses = matrix[picture, head, prefix:, :prefix].mean(0)
                torch.testing.assert_close(seen.heads.prefix[place], masses)


@pytest.mark.parametrize("registers", [0, 3])
def test_every_block_gives_the_unfused_attention(registers):
    model = make_model(registers=registers)
    images = torch.randn(2, 3, 24, 40)
    found = []

    def visit(_block, queries, keys):
        found.append(torch.cat([weights for _, weights in attention_rows(queries, keys)], dim=2))

    with capture_qk(model.backbone, visit, blocks=range(3)):
        model.backbone.vit.forward_features(images)
    for mine, matrix in zip(found, slow.unfused_attention(model.backbone, images), strict=True):
        torch.testing.assert_close(mine, matrix, atol=1e-6, rtol=0)


@pytest.mark.parametrize("registers", [0, 3])
def test_rollout_equals_the_loops(registers):
    model, crops = make_model(registers=registers), make_crops()
    observer, _, seen = observe(model, crops)
    matrices = slow.unfused_attention(model.backbone, observer.cut.normalize(crops))
    for picture, drawn in enumerate(seen.drawn):
        expected = slow.rollout([matrix[picture] for matrix in matrices], 1 + registers)
        torch.testing.assert_close(drawn.rollout.flatten().double(), expected, atol=1e-6, rtol=0)
        last = matrices[-1][picture].mean(0)[0, 1 + registers :]
        assert drawn.last.sum() == pytest.approx(1, abs=1e-5)
        assert torch.corrcoef(torch.stack([drawn.last.flatten(), last]))[0, 1] > 0.95


def test_attention_that_is_formed_in_pieces_is_the_same(monkeypatch):
    model, crops = make_model(registers=2), make_crops()
    _, _, whole = observe(model, crops)
    monkeypatch.setattr(heads_module, "WEIGHTS", 500)  # 4 rows of 2 images and 3 heads at a time
    _, _, pieces = observe(model, crops)
    for one, other in zip(whole.heads, pieces.heads, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole.drawn[1].rollout, pieces.drawn[1].rollout)


def test_batches_of_any_size_see_the_same():
    model, crops = make_model(), make_crops(5)
    _, layers, whole = observe(model, crops, drawn=2)
    observer = Observer(model, None)
    parts = [observer.see(crops[:1], drawn=2), observer.see(crops[1:], drawn=1)]
    seen = observer.observation()
    assert len(seen.drawn) == 2
    torch.testing.assert_close(seen.drawn[1].rollout, whole.drawn[1].rollout)
    torch.testing.assert_close(seen.heads.distance, whole.heads.distance)
    torch.testing.assert_close(seen.norms.levels, whole.norms.levels)
    torch.testing.assert_close(seen.features, whole.features)
    for one, *rest in zip(layers, *parts, strict=True):
        torch.testing.assert_close(one, torch.cat(rest))


@pytest.mark.parametrize(
    ("grid", "patch", "pixels"), [((14, 14), 16, 116.5), ((8, 8), 4, 16.5), ((30, 30), 16, 250), ((60, 60), 8, 250)]
)
def test_uniform_attention_has_the_known_distance(grid, patch, pixels):
    centers = patch_centers(grid, patch)
    assert uniform_distance(centers) == pytest.approx(pixels, abs=0.8)
    assert uniform_distance(centers) == pytest.approx(0.520 * grid[0] * patch, rel=0.01)
    if grid[0] <= 14:
        assert uniform_distance(centers) == pytest.approx(pixels, abs=0.05)
        tokens = 1 + len(centers)
        same = torch.zeros(1, 2, tokens, 4)  # equal logits: uniform attention
        readings = head_statistics(same, same, prefix=1, centers=centers)
        torch.testing.assert_close(readings.distance, torch.full((1, 2), uniform_distance(centers)))
        torch.testing.assert_close(readings.entropy, torch.ones(1, 2))
        torch.testing.assert_close(readings.prefix, torch.full((1, 2, 1), 1 / tokens))
        torch.testing.assert_close(readings.diversity, torch.zeros(1, 2), atol=1e-5, rtol=0)


def test_a_head_that_looks_at_itself_alone_has_no_distance_and_no_entropy():
    eye = 100 * torch.eye(10)[None, None]
    readings = head_statistics(eye, eye, prefix=1, centers=patch_centers((3, 3), 16))
    assert readings.distance.item() == pytest.approx(0, abs=1e-4)
    assert readings.entropy.item() == pytest.approx(0, abs=1e-4)
    assert readings.diversity.isnan()  # a single head has no other


def test_cka_equals_the_loops_over_quadruples():
    torch.manual_seed(0)
    x = torch.randn(13, 5, dtype=torch.float64) + 3
    y = torch.cat([x[:, :2], torch.randn(13, 9, dtype=torch.float64)], dim=1)
    for size in (256, 9, 5, 6):  # whole; rest of 4; rest of 3, which is left out; rest of 1
        cka = LinearCKA(size)
        for start, end in ((0, 1), (1, 8), (8, 13)):
            cka.add([x[start:end], y[start:end]])
        assert cka.result()[0, 1] == pytest.approx(slow.minibatch_cka(x, y, size), abs=1e-6)


def test_cka_is_1_with_itself_and_keeps_under_rotation_scale_and_shift():
    torch.manual_seed(0)
    x, y = torch.randn(40, 12), torch.randn(40, 30)
    y[:, :12] += x
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    cka = LinearCKA()
    cka.add([x, 7 * x @ rotation + 5, y])
    result = cka.result()
    torch.testing.assert_close(result.diagonal(), torch.ones(3))
    assert result[0, 1] == pytest.approx(1, abs=1e-5)
    assert result[1, 2] == pytest.approx(float(result[0, 2]), abs=1e-5)
    assert 0.2 < result[0, 2] < 0.9


def test_cka_of_minibatches_is_that_of_all_images_without_the_bias_of_few():
    torch.manual_seed(0)
    shared = torch.randn(2048, 20)
    x, y = (torch.cat([shared, torch.randn(2048, 60)], dim=1) for _ in range(2))
    noise = torch.randn(2048, 300)  # of more dimensions than images of a minibatch
    results = {}
    for size in (2048, 128):
        cka = LinearCKA(size)
        for part in zip(*(features.split(100) for features in (x, y, noise)), strict=True):
            cka.add(list(part))
        results[size] = cka.result()
    torch.testing.assert_close(results[128], results[2048], atol=0.02, rtol=0)
    assert abs(results[128][0, 2]) < 0.02  # the biased estimate would be above 0.5


def test_cka_of_too_few_images_and_of_constant_layers_says_so():
    cka = LinearCKA()
    assert cka.result() is None
    cka.add([torch.randn(3, 4)])
    assert cka.result() is None
    cka.add([torch.randn(1, 4)])
    assert cka.result() is not None
    cka = LinearCKA()
    cka.add([torch.randn(6, 4), torch.ones(6, 4)])
    assert cka.result()[0].isnan().tolist() == [False, True]


@pytest.mark.parametrize("shape", [(48, 3, 8, 8), (20, 3, 4, 4), (30, 1, 2, 2)])
def test_filter_components_equal_numpys(shape):
    weight = torch.randn(*shape, generator=torch.manual_seed(0)) * torch.linspace(0.1, 2, shape[-1])
    found = filter_components(weight)
    points = weight.flatten(1).double().numpy()
    _, strengths, components = np.linalg.svd(points - points.mean(0), full_matrices=False)
    explained = strengths**2 / (strengths**2).sum()
    assert found.explained.numpy() == pytest.approx(explained, abs=1e-6)
    count = min(28, *points.shape)
    assert found.filters.shape == (count, *shape[1:])
    mine = found.filters.flatten(1).numpy()
    for index in range(min(count, 20) - 1):
        assert abs(mine[index] @ components[index]) == pytest.approx(1, abs=1e-4)
        assert mine[index][np.abs(mine[index]).argmax()] > 0
    assert filter_panel({"model": found, "random init": found}).image.width == 1400


def test_position_similarity_leaves_out_class_token_and_registers():
    for registers in (0, 4):
        backbone = make_model(registers=registers).backbone
        vit = backbone.vit
        rows = torch.randn(4, 48)
        vit.pos_embed.data[0, -16:] = rows.repeat_interleave(4, 0)  # the same along each row
        vit.pos_embed.data[0, :-16] = 100
        similarity = position_similarity(backbone)
        assert similarity.shape == (4, 4, 4, 4)
        expected = torch.nn.functional.cosine_similarity(rows[:, None], rows, dim=-1)
        torch.testing.assert_close(similarity[:, 0, :, 3], expected)
        torch.testing.assert_close(similarity[2, :, 2], torch.ones(4, 4))
    vit.pos_embed = None
    assert position_similarity(backbone) is None


def test_position_panel_shows_some_places_of_a_fine_grid():
    panel = position_panel(torch.rand(40, 30, 40, 30))
    assert "of the 40 x 30, 14 x 14 are shown" in panel.text
    assert panel.image.width == 1400


def test_a_planted_high_norm_token_is_found():
    torch.manual_seed(0)
    norms = torch.rand(5, 3, 16) + 10
    norms[2, 1, 7] = 60
    found = token_norms(norms)
    expected = torch.zeros(5, 3)
    expected[2, 1] = 1 / 16
    torch.testing.assert_close(found.outliers, expected)
    torch.testing.assert_close(found.levels[..., -1], norms.amax(-1))
    torch.testing.assert_close(found.levels[..., 1], norms.quantile(0.5, dim=-1))
    assert worst_block(found) == 1
    maps = [NormMap(make_crops(1)[0], norms[place, 1].view(4, 4)) for place in range(4)]
    panel = norms_panel({"model": found}, maps, 1)
    assert "0.00" not in panel.text
    assert f"{100 / 80:.2f} % at most, behind block 1" in panel.text


def test_a_high_norm_token_in_a_model_is_found_where_it_is():
    model, crops = make_model(), make_crops(3)
    model.backbone.vit.pos_embed.data[0, 1 + 6] *= 3000  # the seventh patch of every image
    _, _, seen = observe(model, crops)
    torch.testing.assert_close(seen.norms.outliers, torch.full((3, 3), 1 / 16))
    for drawn in seen.drawn:
        assert drawn.norms[1].argmax() == 6
        assert drawn.norms[1].max() > OUTLIER * drawn.norms[1].median()


def test_the_spectrum_of_known_features():
    x = torch.linalg.qr(torch.randn(50, 8, generator=torch.manual_seed(0))).Q  # eight equal singular values
    found = spectrum(x)
    assert found.rank == pytest.approx(8, rel=1e-4)
    torch.testing.assert_close(found.shares, torch.full((8,), 1 / 8))
    collapsed = spectrum(torch.ones(50, 8))
    assert collapsed.rank == pytest.approx(1, abs=1e-3)
    panel = spectrum_panel({"model": collapsed, "random init": found}, features="[CLS] tokens", dataset=50)
    assert "(1.0 here, at most 8)" in panel.text


@pytest.mark.parametrize("size", [16, 48])
def test_images_of_another_size_than_the_models(size):
    _, _, seen = observe(make_model(), make_crops(2, size), image_size=size)
    assert seen.drawn[0].rollout.shape == (size // 8, size // 8)
    assert seen.heads.distance.isfinite().all()


@pytest.mark.parametrize("size", [8, 30, 4])
def test_a_size_that_gives_no_patches_to_compare_is_refused(size):
    with pytest.raises(UserError, match=f"image_size={size}.*multiple"):
        Observer(make_model(), size)


def test_gray_images_are_drawn_and_random_rollouts_share_the_scale():
    map_ = torch.full((4, 4), 1 / 16)
    peak = torch.full((4, 4), 0.01)
    peak[1, 2] = 0.85
    rows = [Rolled(make_crops(1, channels=1)[0], map_, peak, map_), Rolled(make_crops(1)[0], map_, map_, map_)]
    with_random = np.asarray(rollout_panel(rows).image).astype(int)
    without = np.asarray(rollout_panel([row._replace(random=None) for row in rows]).image)
    assert with_random.shape[1] > without.shape[1] > 900
    # The random column is as flat as it is: dark on the model's scale.
    assert np.ptp(with_random[420:700, 1060:1340].sum(-1)) < np.ptp(with_random[80:400, 700:1020].sum(-1))


def test_matrices_of_any_depth_are_drawn():
    for shape in ((1, 1), (3, 12), (24, 24)):
        similarity = torch.rand(shape)
        similarity[0, 0] = torch.nan
        assert versus_panel(similarity, "other", 16).image.size == layers_panel(similarity, None, 9).image.size
