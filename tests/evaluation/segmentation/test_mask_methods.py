"""LOST, TokenCut, PCA and FOUND equal their papers' definitions and are defined for odd images."""

import numpy as np
import pytest
import torch

from ssl_vit.data.sources.image_folder import load_images_at
from ssl_vit.evaluation.segmentation.mask_methods import METHODS, NEED_CLS, build_segmenters
from ssl_vit.evaluation.segmentation.patch_mask import found_mask, lost_mask, sparsity_weights
from ssl_vit.evaluation.segmentation.pca import fit_pca, pca_segmenter
from ssl_vit.evaluation.segmentation.tokencut import tokencut_mask
from ssl_vit.models.attention_maps import LastBlockFeatures, extract_last_block, resize_to_patch_multiple
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.errors import UserError
from tests.reference import segmentation as textbook

GRIDS = [(2, 1), (1, 7), (3, 5), (8, 8), (9, 14), (20, 13)]


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)


def make_features(grid: tuple[int, int], seed: int = 0, heads: int = 3, width: int = 8) -> LastBlockFeatures:
    """Make features of two kinds of patches, foreground and background, with noise."""
    rows, columns = grid
    random = torch.Generator().manual_seed(seed)
    inside = torch.zeros(rows, columns)
    inside[rows // 3 : rows // 3 + (rows + 1) // 2, columns // 4 : columns // 4 + (columns + 2) // 3] = 1
    kinds = torch.randn(2, heads, width, generator=random)
    noise = torch.randn(heads, rows, columns, width, generator=random)
    keys = kinds[inside.long()].permute(2, 0, 1, 3) + 0.7 * noise
    attention = (inside + torch.rand(heads, rows, columns, generator=random)) ** 2
    patches = 2 * inside[..., None] * torch.randn(12, generator=random) + torch.randn(
        rows, columns, 12, generator=random
    )
    return LastBlockFeatures(attention / attention.sum((1, 2), keepdim=True), keys, patches)


def flipped(features: LastBlockFeatures, dims: list[int]) -> LastBlockFeatures:
    keys = features.keys.flip([dim + 1 for dim in dims])
    return LastBlockFeatures(features.cls.flip([dim + 1 for dim in dims]), keys, features.patches.flip(dims))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_lost_mask_equals_the_papers_definition(grid, seed):
    features = make_features(grid, seed)
    sums, mask = textbook.lost(features.keys.double().numpy())
    segmentation = lost_mask(features)
    np.testing.assert_array_equal(segmentation.mask.numpy(), mask)
    np.testing.assert_allclose(segmentation.score_map.numpy(), sums / np.abs(sums).max(), atol=1e-5)


def test_lost_mask_expands_by_the_hundred_patches_of_lowest_degree():
    features = make_features((16, 16), seed=3)
    keys = features.keys.double().numpy()
    scores = lost_mask(features).score_map.numpy()
    hundred, all_of_them = (textbook.lost(keys, k)[0] for k in (100, 256))
    np.testing.assert_allclose(scores, hundred / np.abs(hundred).max(), atol=1e-5)
    assert np.abs(scores - all_of_them / np.abs(all_of_them).max()).max() > 1e-3


@pytest.mark.parametrize("grid", GRIDS[1:])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tokencut_mask_equals_the_dense_generalized_eigensolution(grid, seed):
    features = make_features(grid, seed)
    vector, mask = textbook.tokencut(features.keys.double().numpy())
    segmentation = tokencut_mask(features)
    np.testing.assert_array_equal(segmentation.mask.numpy(), mask)
    correlation = np.corrcoef(segmentation.score_map.numpy().ravel(), vector.ravel())[0, 1]
    assert correlation == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_found_mask_equals_the_papers_definition(grid, seed):
    features = make_features(grid, seed)
    cosines, mask = textbook.found(features.cls.double().numpy(), features.keys.double().numpy())
    segmentation = found_mask(features)
    np.testing.assert_array_equal(segmentation.mask.numpy(), mask)
    np.testing.assert_allclose(segmentation.score_map.numpy(), 0.3 - cosines, atol=1e-5)


def test_sparsity_weights_are_larger_for_heads_that_attend_to_fewer_patches():
    narrow, wide = torch.zeros(2, 4, 4)
    narrow[1, 1] = 1
    wide[:3] = 1 / 12
    weights = sparsity_weights(torch.stack([wide, narrow]))
    assert weights[1] > weights[0] > 0


@pytest.mark.parametrize("grids", [[(4, 6)], [(3, 3), (5, 2), (1, 9), (6, 6)]])
def test_fit_pca_equals_the_textbook_components(grids):
    images = [make_features(grid, seed) for seed, grid in enumerate(grids)]
    mean, components, std = textbook.principal_components([features.patches.double().numpy() for features in images])
    basis = fit_pca(images)
    np.testing.assert_allclose(basis.mean.numpy(), mean, atol=1e-12)
    np.testing.assert_allclose(basis.components.numpy(), components, atol=1e-9)
    np.testing.assert_allclose(basis.std.numpy(), std, atol=1e-9)
    for features in images:
        scores = ((features.patches.double().numpy() - mean) @ components[0] / std[0]).astype(np.float32)
        segmentation = pca_segmenter(basis)(features)
        np.testing.assert_allclose(segmentation.score_map.numpy(), scores, atol=1e-6)
        assert torch.equal(segmentation.mask, segmentation.score_map > 0)


def test_fit_pca_is_independent_of_the_order_and_points_away_from_the_border():
    images = [make_features((6, 7), seed) for seed in range(5)]
    basis, backwards = fit_pca(images), fit_pca(reversed(images))
    torch.testing.assert_close(basis.components, backwards.components)
    border = torch.ones(6, 7, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    along = torch.stack([basis.project(features.patches)[:, border] for features in images])  # (5, 3, border)
    assert (along.mean((0, 2)) < 0).all()


def test_fit_pca_of_negated_tokens_is_negated():
    images = [make_features((6, 7), seed) for seed in range(3)]
    basis = fit_pca(images)
    negated = fit_pca(features._replace(patches=-features.patches) for features in images)
    torch.testing.assert_close(negated.components, -basis.components)
    for features in images:
        torch.testing.assert_close(negated.project(-features.patches), basis.project(features.patches))


def test_fit_pca_is_stable_with_a_large_mean():
    features = make_features((8, 9))
    near, far = (
        fit_pca(features._replace(patches=rows + offset) for rows in features.patches.double().split(2))
        for offset in (0, 1e5)
    )
    torch.testing.assert_close(far.std, near.std, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 0.25, 1e4])
@pytest.mark.parametrize("method", [lost_mask, tokencut_mask, found_mask])
def test_masks_are_independent_of_the_scale_of_keys(method, scale):
    features = make_features((9, 11))
    plain, scaled = method(features), method(features._replace(keys=features.keys * scale))
    assert torch.equal(plain.mask, scaled.mask)
    torch.testing.assert_close(plain.score_map, scaled.score_map, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dims", [[0], [1], [0, 1]])
@pytest.mark.parametrize("name", METHODS)
def test_masks_of_a_mirrored_image_are_mirrored(name, dims):
    features = make_features((8, 11), seed=4)
    segment = build_segmenters([name], [features])[name]
    plain, mirrored = segment(features), segment(flipped(features, dims))
    assert torch.equal(mirrored.mask, plain.mask.flip(dims))
    torch.testing.assert_close(mirrored.score_map, plain.score_map.flip(dims), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_independent_of_the_order_of_heads_and_channels(name):
    features = make_features((8, 11), seed=1)
    other = LastBlockFeatures(features.cls.flip(0), features.keys.flip([0, 3]), features.patches.flip(2))
    plain, permuted = (build_segmenters([name], [s])[name](s) for s in (features, other))
    assert torch.equal(plain.mask, permuted.mask)
    torch.testing.assert_close(plain.score_map, permuted.score_map, atol=1e-5, rtol=0)


def test_tokencut_mask_keeps_the_part_with_the_strongest_patch():
    keys = torch.zeros(1, 1, 20, 2)
    keys[..., 0] = 1
    keys[0, 0, [2, 3, 4, 9]] = torch.tensor([0.0, 1.0])
    segmentation = tokencut_mask(LastBlockFeatures(None, keys, keys[0]))
    assert segmentation.mask.flatten().nonzero().flatten().tolist() == [2, 3, 4]
    assert (segmentation.score_map > 0).flatten().nonzero().flatten().tolist() == [2, 3, 4, 9]


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (1, 3), (1, 40), (40, 1), (2, 2), (9, 9)])
@pytest.mark.parametrize("kind", ["random", "equal", "zero", "one-hot", "two groups", "three groups", "one head"])
def test_masks_are_defined_for_odd_images(kind, grid):
    features = make_odd_features(kind, grid)
    for segment in build_segmenters(METHODS, [features]).values():
        first, second = segment(features), segment(features)
        assert first.score_map.dtype == torch.float32
        assert first.mask.dtype == torch.bool
        assert first.score_map.shape == first.mask.shape == grid
        assert first.score_map.isfinite().all()
        assert (first.score_map[first.mask] >= 0).all()
        assert torch.equal(first.score_map, second.score_map)
        assert torch.equal(first.mask, second.mask)


def make_odd_features(kind: str, grid: tuple[int, int]) -> LastBlockFeatures:
    count = grid[0] * grid[1]
    number = torch.arange(count)
    width = max(count, 8)
    keys = {
        "random": torch.randn(2, count, width, generator=torch.Generator().manual_seed(0)),
        "equal": torch.linspace(-1, 2, width).expand(2, count, width),
        "zero": torch.zeros(2, count, width),
        "one-hot": torch.eye(width)[:count].expand(2, count, width),
        "two groups": torch.eye(width)[number % 5 // 3].expand(2, count, width),
        "three groups": torch.eye(width)[number % 3].expand(2, count, width),
        "one head": torch.randn(1, count, width, generator=torch.Generator().manual_seed(1)),
    }[kind].view(-1, *grid, width)
    attention = torch.full((len(keys), *grid), 1 / count)
    return LastBlockFeatures(attention, keys, keys[0])


@pytest.mark.parametrize(
    ("name", "kind", "full"),
    [
        ("lost", "equal", True),
        ("lost", "zero", False),
        ("tokencut", "equal", False),
        ("tokencut", "zero", False),
        ("tokencut", "one-hot", False),
        ("pca", "equal", False),
        ("pca", "zero", False),
        ("found", "equal", False),
        ("found", "zero", True),
    ],
)
def test_masks_of_an_image_without_contrast_are_full_or_empty(name, kind, full):
    features = make_odd_features(kind, (4, 6))
    mask = build_segmenters([name], [features])[name](features).mask
    assert torch.equal(mask, torch.full((4, 6), full))


def test_mask_methods_find_a_single_patch_with_lost_alone():
    features = make_odd_features("random", (1, 1))
    masks = {name: segment(features).mask.item() for name, segment in build_segmenters(METHODS, [features]).items()}
    assert masks == {"lost": True, "tokencut": False, "pca": False, "found": False}


def test_tokencut_mask_of_a_large_grid_with_few_kinds_of_patches_is_deterministic():
    """Lanczos' method then finds an invariant subspace after a few steps and restarts from a random vector."""
    features = make_odd_features("three groups", (12, 24))
    first = tokencut_mask(features)
    assert first.mask.any()
    for _ in range(3):
        assert torch.equal(tokencut_mask(features).score_map, first.score_map)


def test_build_segmenters_by_name():
    features = make_features((5, 6))
    assert set(METHODS) == {"lost", "tokencut", "pca", "found"}
    assert list(build_segmenters(["pca", "lost"], iter([features]))) == ["pca", "lost"]
    unread = iter([features])
    build_segmenters(["lost", "tokencut", "found"], unread)
    assert next(unread) is features
    with pytest.raises(UserError, match="unknown segmentation method snow; choose from lost, tokencut, pca, found"):
        build_segmenters(["lost", "snow"], [features])
    with pytest.raises(UserError, match="pca needs at least one image"):
        build_segmenters(["pca"], [])


def test_methods_that_need_the_class_token_refuse_a_model_without():
    features = make_features((5, 6))._replace(cls=None)
    for name, segment in build_segmenters(METHODS, [features]).items():
        if name in NEED_CLS:
            with pytest.raises(UserError, match=f"{name} needs a model with a class token; lost, tokencut and pca"):
                segment(features)
        else:
            assert segment(features).mask.shape == (5, 6)


def test_masks_of_a_real_image_equal_the_textbook(ecssd):
    """The keys of a random model are nearly equal, so that their mean is subtracted."""
    model = load_backbone("random:vit_tiny_patch16_224")
    image = resize_to_patch_multiple(load_images_at(ecssd / "images").read(0, 3), 16)
    features = extract_last_block(model.backbone, image[None].float() / 255)[0]
    features = features._replace(keys=features.keys - features.keys.mean((1, 2), keepdim=True))
    keys = features.keys.double().numpy()
    np.testing.assert_array_equal(lost_mask(features).mask.numpy(), textbook.lost(keys)[1])
    np.testing.assert_array_equal(tokencut_mask(features).mask.numpy(), textbook.tokencut(keys)[1])
    np.testing.assert_array_equal(
        found_mask(features).mask.numpy(), textbook.found(features.cls.double().numpy(), keys)[1]
    )
