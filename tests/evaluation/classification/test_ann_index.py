"""The IVF index: target recall, its measurement, excluded images, files."""

import pytest
import torch

from ssl_vit.evaluation.classification import ann_index
from ssl_vit.evaluation.classification.ann_index import IVFIndex, StaleIndexError
from ssl_vit.evaluation.classification.nearest_neighbors import exact_search


def clouds(count, seed, *, dim=32, centers=60):
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(centers, dim, generator=torch.Generator().manual_seed(99))
    return middle[torch.randint(centers, (count,), generator=g)] + 0.6 * torch.randn(count, dim, generator=g)


def exact(queries, features, k, exclude=None):
    return exact_search(
        torch.nn.functional.normalize(queries, dim=1),
        torch.nn.functional.normalize(features, dim=1),
        k=k,
        exclude=exclude,
    )


@pytest.fixture(scope="module")
def features():
    return clouds(6000, 0)


@pytest.fixture(scope="module")
def index(features):
    return IVFIndex.build(features, k=10, recall=0.99, seed=0)


def test_build_reaches_the_recall_with_some_of_the_lists(index, features):
    quality = index.quality
    assert quality.lists == 6000 // 39  # fewer than 4 sqrt(6000): k-means needs its rows
    assert quality.probes < quality.lists / 2
    assert quality.recall > 0.98
    queries = clouds(500, 1)  # other images than the set's
    found, target = index.search(queries, k=10), exact(queries, features, 10)
    near_enough = found.similarity >= target.similarity[:, -1:] - 1e-6
    assert near_enough.float().mean() > 0.97
    assert (found.similarity.diff(dim=1) <= 0).all()


def test_ann_index_recall_is_measured_on_other_rows(index, features):
    drawn = torch.randperm(6000, generator=torch.Generator().manual_seed(0))[1000:2000]
    found = index.search(features[drawn], k=10, exclude=drawn)
    target = exact(features[drawn], features, 10, exclude=drawn)
    same = [len(set(a) & set(b)) for a, b in zip(found.indices.tolist(), target.indices.tolist(), strict=True)]
    assert index.quality.recall == pytest.approx(sum(same) / 10_000, abs=1e-3)
    assert index.quality.queries == 1000


@pytest.mark.parametrize("count", [3, 501])
def test_build_selects_and_measures_on_different_rows(count, monkeypatch):
    queries = []
    monkeypatch.setattr(
        ann_index,
        "exact_search",
        lambda *args, **kwargs: (queries.append(kwargs["exclude"]), exact_search(*args, **kwargs))[1],
    )
    quality = IVFIndex.build(clouds(count, 0), k=1, recall=0.9, seed=0).quality
    choosing, measuring = (set(rows.tolist()) for rows in queries)
    assert not choosing & measuring
    assert len(choosing | measuring) == count
    assert quality.queries == len(measuring)


def test_build_searches_more_lists_for_a_larger_recall(features):
    some, most, everything = (IVFIndex.build(features, k=10, recall=recall, seed=0) for recall in (0.8, 0.99, 1.0))
    assert some.quality.probes < most.quality.probes < everything.quality.probes <= everything.quality.lists
    assert some.quality.recall < most.quality.recall <= everything.quality.recall
    assert everything.quality.recall > 0.999


def test_search_excludes_the_image_even_among_its_copies(features):
    copied = torch.cat([features, features[:20].repeat(8, 1)])
    index = IVFIndex.build(copied, k=5, recall=0.99, seed=0)
    exclude = torch.arange(20)
    found = index.search(copied[:20], k=5, exclude=exclude)
    assert not (found.indices == exclude[:, None]).any()
    assert (found.similarity > 0.99999).all()


def test_search_uses_all_lists_if_the_probed_ones_hold_too_few(index, features):
    queries = clouds(20, 1)
    found = index.search(queries, k=3000)
    torch.testing.assert_close(found.similarity, exact(queries, features, 3000).similarity, rtol=0, atol=1e-5)
    assert (found.indices >= 0).all()
    assert index.search(queries, k=6000).indices.shape == (20, 6000)


@pytest.mark.parametrize("count", [3, 50])
def test_search_of_small_sets_is_exact(count):
    features = clouds(count, 0)
    index = IVFIndex.build(features, k=2, recall=0.99, seed=0)
    exclude = torch.arange(count)
    assert torch.equal(
        index.search(features, k=2, exclude=exclude).indices, exact(features, features, 2, exclude=exclude).indices
    )


def test_load_returns_the_saved_index(index, features, tmp_path):
    path = tmp_path / "features.ivf"
    index.save(path)
    loaded = IVFIndex.load(path, features)
    assert loaded.quality == index.quality
    queries = clouds(50, 1)
    for one, other in zip(index.search(queries, k=10), loaded.search(queries, k=10), strict=True):
        assert torch.equal(one, other)
    assert [file.name for file in tmp_path.iterdir()] == ["features.ivf"]


def test_load_rejects_other_features_and_damaged_files(index, features, tmp_path):
    path = tmp_path / "features.ivf"
    index.save(path)
    changed = features.clone()
    changed[3, 4] += 1e-4
    for other in (changed, features[:-1], features.flip(0)):
        with pytest.raises(StaleIndexError, match="of other features"):
            IVFIndex.load(path, other)
    content = path.read_bytes()
    for damage in (content[: len(content) // 2], b"", content[:5000] + b"????" + content[5004:]):
        path.write_bytes(damage)
        with pytest.raises(StaleIndexError, match="is not an index"):
            IVFIndex.load(path, features)


def test_load_accepts_float32_of_half_precision_features(tmp_path):
    halves = clouds(500, 0).half()
    index = IVFIndex.build(halves, k=5, recall=0.99, seed=0)
    index.save(tmp_path / "x.ivf")
    assert IVFIndex.load(tmp_path / "x.ivf", halves.float()).quality == index.quality
