"""An index finds the share of neighbors that was wanted, says what it found, and belongs to its features alone."""

import pytest
import torch

from ssl_vit.evaluation.classification import ann_index as searching
from ssl_vit.evaluation.classification.ann_index import Index, StaleIndexError
from ssl_vit.evaluation.classification.nearest_neighbors import exact_search


def clouds(count, seed, *, dim=32, centers=60):
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(centers, dim, generator=torch.Generator().manual_seed(99))
    return middle[torch.randint(centers, (count,), generator=g)] + 0.6 * torch.randn(count, dim, generator=g)


def exact(queries, features, k, own=None):
    return exact_search(
        torch.nn.functional.normalize(queries, dim=1), torch.nn.functional.normalize(features, dim=1), k=k, own=own
    )


@pytest.fixture(scope="module")
def features():
    return clouds(6000, 0)


@pytest.fixture(scope="module")
def index(features):
    return Index.build(features, k=10, recall=0.99, seed=0)


def test_the_recall_is_reached_by_searching_a_part(index, features):
    quality = index.quality
    assert quality.lists == 6000 // 39  # fewer than 4 sqrt(6000): k-means needs its rows
    assert quality.probes < quality.lists / 2
    assert quality.recall > 0.98
    queries = clouds(500, 1)  # other images than the set's
    found, truth = index.nearest(queries, k=10), exact(queries, features, 10)
    near_enough = found.similarity >= truth.similarity[:, -1:] - 1e-6
    assert near_enough.float().mean() > 0.97
    assert (found.similarity.diff(dim=1) <= 0).all()


def test_the_said_recall_is_that_of_rows_the_probes_were_not_chosen_by(index, features):
    drawn = torch.randperm(6000, generator=torch.Generator().manual_seed(0))[1000:2000]
    found = index.nearest(features[drawn], k=10, own=drawn)
    truth = exact(features[drawn], features, 10, own=drawn)
    same = [len(set(a) & set(b)) for a, b in zip(found.place.tolist(), truth.place.tolist(), strict=True)]
    assert index.quality.recall == pytest.approx(sum(same) / 10_000, abs=1e-3)
    assert index.quality.queries == 1000


@pytest.mark.parametrize("count", [3, 501])
def test_no_row_both_chooses_the_probes_and_measures_them(count, monkeypatch):
    asked = []
    monkeypatch.setattr(
        searching, "exact_search", lambda *args, **words: (asked.append(words["own"]), exact_search(*args, **words))[1]
    )
    quality = Index.build(clouds(count, 0), k=1, recall=0.9, seed=0).quality
    choosing, measuring = (set(rows.tolist()) for rows in asked)
    assert not choosing & measuring
    assert len(choosing | measuring) == count
    assert quality.queries == len(measuring)


def test_a_larger_recall_searches_more_and_all_of_it_is_exact(features):
    some, most, everything = (Index.build(features, k=10, recall=recall, seed=0) for recall in (0.8, 0.99, 1.0))
    assert some.quality.probes < most.quality.probes < everything.quality.probes <= everything.quality.lists
    assert some.quality.recall < most.quality.recall <= everything.quality.recall
    assert everything.quality.recall > 0.999


def test_an_image_is_not_its_own_neighbor_even_among_its_copies(features):
    copied = torch.cat([features, features[:20].repeat(8, 1)])
    index = Index.build(copied, k=5, recall=0.99, seed=0)
    own = torch.arange(20)
    found = index.nearest(copied[:20], k=5, own=own)
    assert not (found.place == own[:, None]).any()
    assert (found.similarity > 0.99999).all()


def test_where_the_lists_searched_hold_too_few_all_are_searched(index, features):
    queries = clouds(20, 1)
    found = index.nearest(queries, k=3000)
    torch.testing.assert_close(found.similarity, exact(queries, features, 3000).similarity, rtol=0, atol=1e-5)
    assert (found.place >= 0).all()
    assert index.nearest(queries, k=6000).place.shape == (20, 6000)


@pytest.mark.parametrize("count", [3, 50])
def test_small_sets_are_searched_whole(count):
    features = clouds(count, 0)
    index = Index.build(features, k=2, recall=0.99, seed=0)
    own = torch.arange(count)
    assert torch.equal(index.nearest(features, k=2, own=own).place, exact(features, features, 2, own=own).place)


def test_a_loaded_index_answers_as_the_built_one(index, features, tmp_path):
    path = tmp_path / "features.ivf"
    index.save(path)
    loaded = Index.load(path, features)
    assert loaded.quality == index.quality
    queries = clouds(50, 1)
    for one, other in zip(index.nearest(queries, k=10), loaded.nearest(queries, k=10), strict=True):
        assert torch.equal(one, other)
    assert [file.name for file in tmp_path.iterdir()] == ["features.ivf"]


def test_an_index_of_other_features_and_a_damaged_one_are_refused(index, features, tmp_path):
    path = tmp_path / "features.ivf"
    index.save(path)
    changed = features.clone()
    changed[3, 4] += 1e-4
    for other in (changed, features[:-1], features.flip(0)):
        with pytest.raises(StaleIndexError, match="of other features"):
            Index.load(path, other)
    content = path.read_bytes()
    for damage in (content[: len(content) // 2], b"", content[:5000] + b"????" + content[5004:]):
        path.write_bytes(damage)
        with pytest.raises(StaleIndexError, match="holds no index"):
            Index.load(path, features)


def test_halves_and_their_float32_are_the_same_features(tmp_path):
    halves = clouds(500, 0).half()
    index = Index.build(halves, k=5, recall=0.99, seed=0)
    index.save(tmp_path / "x.ivf")
    assert Index.load(tmp_path / "x.ivf", halves.float()).quality == index.quality
