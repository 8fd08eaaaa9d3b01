"""LOST, TokenCut, PCA and FOUND: as their papers define them, and defined where images are odd."""

import numpy as np
import pytest
import torch

from ssl_vit.data.sources.image_folder import load_images_at
from ssl_vit.evaluation.segmentation.found import found_mask, sparsity_weights
from ssl_vit.evaluation.segmentation.lost import lost_mask
from ssl_vit.evaluation.segmentation.mask_methods import METHODS, NEED_CLS, make_segmenters
from ssl_vit.evaluation.segmentation.pca import PatchStatistics, colors, fit_basis, pca_segmenter
from ssl_vit.evaluation.segmentation.tokencut import tokencut_mask
from ssl_vit.models.attention_maps import LastBlockFeatures, extract_last_block, resize_to_patch_multiple
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.errors import UserError
from tests.reference import segmentation as textbook

GRIDS = [(2, 1), (1, 7), (3, 5), (8, 8), (9, 14), (20, 13)]


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)


def make_sight(grid: tuple[int, int], seed: int = 0, heads: int = 3, width: int = 8) -> LastBlockFeatures:
    """An image with an object in it: patches of two kinds, with noise."""
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


def flipped(sight: LastBlockFeatures, dims: list[int]) -> LastBlockFeatures:
    keys = sight.keys.flip([dim + 1 for dim in dims])
    return LastBlockFeatures(sight.cls.flip([dim + 1 for dim in dims]), keys, sight.patches.flip(dims))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_lost_is_that_of_the_paper(grid, seed):
    sight = make_sight(grid, seed)
    sums, mask = textbook.lost(sight.keys.double().numpy())
    segmentation = lost_mask(sight)
    np.testing.assert_array_equal(segmentation.mask.numpy(), mask)
    np.testing.assert_allclose(segmentation.soft.numpy(), sums / np.abs(sums).max(), atol=1e-5)


def test_lost_expands_by_the_hundred_patches_of_lowest_degree_alone():
    sight = make_sight((16, 16), seed=3)
    keys = sight.keys.double().numpy()
    soft = lost_mask(sight).soft.numpy()
    hundred, all_of_them = (textbook.lost(keys, k)[0] for k in (100, 256))
    np.testing.assert_allclose(soft, hundred / np.abs(hundred).max(), atol=1e-5)
    assert np.abs(soft - all_of_them / np.abs(all_of_them).max()).max() > 1e-3


@pytest.mark.parametrize("grid", GRIDS[1:])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tokencut_is_the_dense_generalised_eigensolution(grid, seed):
    sight = make_sight(grid, seed)
    vector, mask = textbook.tokencut(sight.keys.double().numpy())
    segmentation = tokencut_mask(sight)
    np.testing.assert_array_equal(segmentation.mask.numpy(), mask)
    correlation = np.corrcoef(segmentation.soft.numpy().ravel(), vector.ravel())[0, 1]
    assert correlation == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_found_is_that_of_the_paper(grid, seed):
    sight = make_sight(grid, seed)
    cosines, mask = textbook.found(sight.cls.double().numpy(), sight.keys.double().numpy())
    segmentation = found_mask(sight)
    np.testing.assert_array_equal(segmentation.mask.numpy(), mask)
    np.testing.assert_allclose(segmentation.soft.numpy(), 0.3 - cosines, atol=1e-5)


def test_found_counts_a_head_the_more_the_fewer_patches_it_attends_to():
    narrow, wide = torch.zeros(2, 4, 4)
    narrow[1, 1] = 1
    wide[:3] = 1 / 12
    weights = sparsity_weights(torch.stack([wide, narrow]))
    assert weights[1] > weights[0] > 0


@pytest.mark.parametrize("grids", [[(4, 6)], [(3, 3), (5, 2), (1, 9), (6, 6)]])
def test_components_are_those_of_all_patches_of_all_images(grids):
    sights = [make_sight(grid, seed) for seed, grid in enumerate(grids)]
    mean, components, spread = textbook.principal_components([sight.patches.double().numpy() for sight in sights])
    basis = fit_basis(sights)
    np.testing.assert_allclose(basis.mean.numpy(), mean, atol=1e-12)
    np.testing.assert_allclose(basis.components.numpy(), components, atol=1e-9)
    np.testing.assert_allclose(basis.spread.numpy(), spread, atol=1e-9)
    for sight in sights:
        soft = ((sight.patches.double().numpy() - mean) @ components[0] / spread[0]).astype(np.float32)
        segmentation = pca_segmenter(basis)(sight)
        np.testing.assert_allclose(segmentation.soft.numpy(), soft, atol=1e-6)
        assert torch.equal(segmentation.mask, segmentation.soft > 0)


def test_components_do_not_depend_on_the_order_of_images_and_point_away_from_the_border():
    sights = [make_sight((6, 7), seed) for seed in range(5)]
    basis, backwards = fit_basis(sights), fit_basis(reversed(sights))
    torch.testing.assert_close(basis.components, backwards.components)
    border = torch.ones(6, 7, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    along = torch.stack([basis.project(sight.patches)[:, border] for sight in sights])  # (5, 3, border)
    assert (along.mean((0, 2)) < 0).all()


def test_components_of_negated_tokens_are_negated():
    sights = [make_sight((6, 7), seed) for seed in range(3)]
    basis = fit_basis(sights)
    negated = fit_basis(sight._replace(patches=-sight.patches) for sight in sights)
    torch.testing.assert_close(negated.components, -basis.components)
    for sight in sights:
        torch.testing.assert_close(negated.project(-sight.patches), basis.project(sight.patches))


def test_statistics_hold_with_a_large_mean():
    patches = make_sight((8, 9)).patches.double()
    near, far = PatchStatistics(), PatchStatistics()
    for rows in patches.split(2):
        near.add(rows)
        far.add(rows + 1e5)
    torch.testing.assert_close(far.basis().spread, near.basis().spread, rtol=1e-6, atol=0)


def test_colors_are_between_black_and_white_and_common_to_all_images():
    sights = [make_sight((6, 7), seed) for seed in range(3)]
    basis = fit_basis(sights)
    for sight in sights:
        image = colors(basis, sight.patches)
        assert image.shape == (6, 7, 3)
        assert image.dtype == torch.float32
        assert 0 <= image.min() < 0.3
        assert 0.7 < image.max() <= 1
        torch.testing.assert_close(image[2:, :4], colors(basis, sight.patches[2:, :4]))
    torch.testing.assert_close(colors(basis, basis.mean.view(1, 1, -1)), torch.full((1, 1, 3), 0.5))


@pytest.mark.parametrize("scale", [1e-3, 0.25, 1e4])
@pytest.mark.parametrize("method", [lost_mask, tokencut_mask, found_mask])
def test_the_size_of_keys_does_not_matter(method, scale):
    sight = make_sight((9, 11))
    plain, scaled = method(sight), method(sight._replace(keys=sight.keys * scale))
    assert torch.equal(plain.mask, scaled.mask)
    torch.testing.assert_close(plain.soft, scaled.soft, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dims", [[0], [1], [0, 1]])
@pytest.mark.parametrize("name", METHODS)
def test_a_mirrored_image_has_the_mirrored_object(name, dims):
    sight = make_sight((8, 11), seed=4)
    segment = make_segmenters([name], [sight])[name]
    plain, mirrored = segment(sight), segment(flipped(sight, dims))
    assert torch.equal(mirrored.mask, plain.mask.flip(dims))
    torch.testing.assert_close(mirrored.soft, plain.soft.flip(dims), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_heads_and_of_their_channels_does_not_matter(name):
    sight = make_sight((8, 11), seed=1)
    other = LastBlockFeatures(sight.cls.flip(0), sight.keys.flip([0, 3]), sight.patches.flip(2))
    plain, permuted = (make_segmenters([name], [s])[name](s) for s in (sight, other))
    assert torch.equal(plain.mask, permuted.mask)
    torch.testing.assert_close(plain.soft, permuted.soft, atol=1e-5, rtol=0)


def test_tokencut_keeps_the_part_of_its_side_that_holds_the_strongest_patch():
    keys = torch.zeros(1, 1, 20, 2)
    keys[..., 0] = 1
    keys[0, 0, [2, 3, 4, 9]] = torch.tensor([0.0, 1.0])
    segmentation = tokencut_mask(LastBlockFeatures(None, keys, keys[0]))
    assert segmentation.mask.flatten().nonzero().flatten().tolist() == [2, 3, 4]
    assert (segmentation.soft > 0).flatten().nonzero().flatten().tolist() == [2, 3, 4, 9]


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (1, 3), (1, 40), (40, 1), (2, 2), (9, 9)])
@pytest.mark.parametrize("kind", ["random", "equal", "zero", "one-hot", "two groups", "three groups", "one head"])
def test_odd_images_have_a_defined_object(kind, grid):
    sight = odd_sight(kind, grid)
    for segment in make_segmenters(METHODS, [sight]).values():
        first, second = segment(sight), segment(sight)
        assert first.soft.dtype == torch.float32
        assert first.mask.dtype == torch.bool
        assert first.soft.shape == first.mask.shape == grid
        assert first.soft.isfinite().all()
        assert (first.soft[first.mask] >= 0).all()
        assert torch.equal(first.soft, second.soft)
        assert torch.equal(first.mask, second.mask)


def odd_sight(kind: str, grid: tuple[int, int]) -> LastBlockFeatures:
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
    ("name", "kind", "everything"),
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
def test_an_image_without_contrast_is_all_object_or_none(name, kind, everything):
    sight = odd_sight(kind, (4, 6))
    mask = make_segmenters([name], [sight])[name](sight).mask
    assert torch.equal(mask, torch.full((4, 6), everything))


def test_a_single_patch_is_an_object_for_lost_alone():
    sight = odd_sight("random", (1, 1))
    masks = {name: segment(sight).mask.item() for name, segment in make_segmenters(METHODS, [sight]).items()}
    assert masks == {"lost": True, "tokencut": False, "pca": False, "found": False}


def test_tokencut_of_a_large_grid_with_few_kinds_of_patches_is_the_same_each_time():
    """Lanczos' method has then found all there is after a few steps and begins again from a random vector."""
    sight = odd_sight("three groups", (12, 24))
    first = tokencut_mask(sight)
    assert first.mask.any()
    for _ in range(3):
        assert torch.equal(tokencut_mask(sight).soft, first.soft)


def test_methods_by_name():
    sight = make_sight((5, 6))
    assert set(METHODS) == {"lost", "tokencut", "pca", "found"}
    assert list(make_segmenters(["pca", "lost"], iter([sight]))) == ["pca", "lost"]
    unread = iter([sight])
    make_segmenters(["lost", "tokencut", "found"], unread)
    assert next(unread) is sight
    with pytest.raises(UserError, match="no segmentation method is called snow; there are lost, tokencut, pca, found"):
        make_segmenters(["lost", "snow"], [sight])
    with pytest.raises(UserError, match="pca needs at least one image"):
        make_segmenters(["pca"], [])


def test_without_a_class_token_all_but_those_that_need_one():
    sight = make_sight((5, 6))._replace(cls=None)
    for name, segment in make_segmenters(METHODS, [sight]).items():
        if name in NEED_CLS:
            with pytest.raises(UserError, match=f"{name} needs a model with a class token; lost, tokencut and pca"):
                segment(sight)
        else:
            assert segment(sight).mask.shape == (5, 6)


def test_a_real_image(ecssd):
    """As the textbook forms have it, from a random model's keys less their mean, which they nearly all equal."""
    model = load_backbone("random:vit_tiny_patch16_224")
    image = resize_to_patch_multiple(load_images_at(ecssd / "images").read(0, 3), 16)
    sight = extract_last_block(model.backbone, image[None].float() / 255)[0]
    sight = sight._replace(keys=sight.keys - sight.keys.mean((1, 2), keepdim=True))
    keys = sight.keys.double().numpy()
    np.testing.assert_array_equal(lost_mask(sight).mask.numpy(), textbook.lost(keys)[1])
    np.testing.assert_array_equal(tokencut_mask(sight).mask.numpy(), textbook.tokencut(keys)[1])
    np.testing.assert_array_equal(found_mask(sight).mask.numpy(), textbook.found(sight.cls.double().numpy(), keys)[1])
