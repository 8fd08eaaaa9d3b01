"""kNN equals its textbook form image by image, with either engine, in blocks of any size."""

import pytest
import torch

from ssl_vit.evaluation.classification import knn as knn_module
from ssl_vit.evaluation.classification import nearest_neighbors as search_module
from ssl_vit.evaluation.classification.knn import UNRANKED, LabeledFeatures, knn, rank_of_true_class, search, votes
from ssl_vit.evaluation.classification.nearest_neighbors import Neighbors, exact_search
from ssl_vit.evaluation.results.eval_result import topk_metrics
from tests.reference import probes

TEMPERATURE = 0.07


def clouds(count, seed, *, dim=16, labels=(0, 1, 2, 3, 4, 5, 6)):
    """Return features around one center per class, overlapping."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(labels)[torch.randint(len(labels), (count,), generator=g)]
    centers = torch.randn(max(labels) + 1, dim, generator=torch.Generator().manual_seed(99))
    return LabeledFeatures(centers[chosen] + 1.5 * torch.randn(count, dim, generator=g), chosen)


def signs(count, seed, *, dim=4):
    """Return corners of a cube: cosines are exact in float32, and most of them are ties."""
    g = torch.Generator().manual_seed(seed)
    corners = torch.randint(2, (count, dim), generator=g).float() * 2 - 1
    return LabeledFeatures(corners, torch.randint(3, (count,), generator=g))


def textbook_ranks(train, queries, k, temperature=TEMPERATURE):
    """Return the ranks of the true classes; classes without a vote have none."""
    leave_one_out = queries is None
    queries = train if leave_one_out else queries
    predictions = probes.knn_classes(
        queries.features.double().numpy(),
        train.features.double().numpy(),
        train.labels.tolist(),
        k,
        temperature,
        leave_one_out=leave_one_out,
    )
    pairs = zip(predictions, queries.labels.tolist(), strict=True)
    return [voted.index(label) if label in voted else UNRANKED for voted, label in pairs]


@pytest.fixture
def small_blocks(monkeypatch):
    """Divide searches of a few rows into many blocks."""
    monkeypatch.setattr(search_module, "_QUERIES", 7)
    monkeypatch.setattr(search_module, "_ROWS", 11)
    monkeypatch.setattr(knn_module, "_VOTES", 40)


@pytest.mark.parametrize("engine", ["auto", "torch", "faiss"])
@pytest.mark.parametrize(
    ("labels", "test_labels"),
    [
        ((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6)),
        ((3, 17, 40), (3, 17, 40)),  # labels with gaps
        ((0, 1, 2, 3), (1, 3)),  # classes missing in the test images
        ((0, 1), (0, 1, 5)),  # and in the training images
    ],
)
@pytest.mark.parametrize("n_test", [1, 60])  # fewer than 100: DINO's chunks become empty
def test_knn_equals_the_textbook_form(engine, labels, test_labels, n_test):
    train, queries = clouds(150, 0, labels=labels), clouds(n_test, 1, labels=test_labels)
    result = knn(train, queries, ks=[1, 5, 20, 100], temperature=TEMPERATURE, engine=engine)
    for k, ranks in result.ranks.items():
        assert ranks.tolist() == textbook_ranks(train, queries, k)
    assert list(result.k_effective.items()) == [(1, 1), (5, 5), (20, 20), (100, 100)]


@pytest.mark.parametrize("engine", ["auto", "torch", "faiss"])
def test_knn_leave_one_out_equals_the_textbook_form(engine):
    train = clouds(80, 0)
    result = knn(train, None, ks=[3, 20], temperature=TEMPERATURE, engine=engine)
    for k, ranks in result.ranks.items():
        assert ranks.tolist() == textbook_ranks(train, None, k)


@pytest.mark.parametrize("engine", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 5, 30, 59])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_exact_search_orders_equal_neighbors_by_index(engine, k, leave_one_out, small_blocks):
    """60 corners of 16: each query has several neighbors of equal cosine, on both sides of the k-th."""
    train, queries = signs(60, 0), signs(25, 1)
    expected = probes.nearest(
        (train if leave_one_out else queries).features.double().numpy(),
        train.features.double().numpy(),
        k,
        leave_one_out=leave_one_out,
    )
    unit = train.features / 2
    found = exact_search(
        unit if leave_one_out else queries.features / 2,
        unit,
        k=k,
        exclude=torch.arange(60) if leave_one_out else None,
        engine=engine,
    )
    assert found.indices.tolist() == expected
    ranks = knn(train, None if leave_one_out else queries, ks=[k], temperature=0.5, engine=engine).ranks[k]
    assert ranks.tolist() == textbook_ranks(train, None if leave_one_out else queries, k, temperature=0.5)


def test_exact_search_excludes_the_image_but_not_its_copies():
    train = clouds(30, 0)
    train = LabeledFeatures(train.features.repeat(2, 1), train.labels.repeat(2))
    unit = torch.nn.functional.normalize(train.features, dim=1)
    found = exact_search(unit, unit, k=5, exclude=torch.arange(60))
    assert (found.indices[:, 0] == (torch.arange(60) + 30) % 60).all()
    assert not (found.indices == torch.arange(60)[:, None]).any()
    assert len(search(train, None, max_k=1).near_duplicates()) == 60
    assert (knn(train, None, ks=[1], temperature=TEMPERATURE).ranks[1] == 0).all()


def test_exact_search_does_not_depend_on_the_block_size(monkeypatch):
    train, queries = clouds(500, 0, dim=64), clouds(90, 1, dim=64)
    whole = exact_search(queries.features, train.features, k=40)
    monkeypatch.setattr(search_module, "_QUERIES", 32)
    for block in (16, 100, 499):  # smaller than k, uneven, one row remaining
        monkeypatch.setattr(search_module, "_ROWS", block)
        found = exact_search(queries.features, train.features, k=40)
        torch.testing.assert_close(found.similarity, whole.similarity)
        assert torch.equal(found.indices, whole.indices)


@pytest.fixture
def by_bfloat16(monkeypatch):
    """Begin small searches in bfloat16, too, and fail if one falls back on all products."""
    monkeypatch.setattr(search_module, "autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(search_module, "_MIN_GROUPS", 2)
    monkeypatch.setattr(search_module, "_all_products", lambda *_: pytest.fail("all products were computed"))


def different(train, queries):
    return train, queries


def far_from_the_origin(train, queries):
    return train + 3, queries + 3


def scaled(train, queries):
    return train * torch.linspace(0.1, 10, len(train))[:, None], queries * 100


def duplicated(train, queries):
    return train[: len(train) // 2].repeat(2, 1), queries


@pytest.mark.parametrize("geometry", [different, far_from_the_origin, scaled, duplicated])
@pytest.mark.parametrize("block", [1500, 65536])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_exact_search_in_bfloat16_finds_the_nearest_of_float64(
    geometry, block, leave_one_out, by_bfloat16, monkeypatch
):
    """Only rows a rounding error of float32 apart may be swapped."""
    monkeypatch.setattr(search_module, "_ROWS", block)
    train, queries = geometry(clouds(3000, 0, dim=48).features, clouds(300, 1, dim=48).features)
    own = torch.arange(300) if leave_one_out else None
    queries = train[:300] if leave_one_out else queries
    found = exact_search(queries, train, k=40, exclude=own)

    products = queries.double() @ train.double().T
    if leave_one_out:
        products[own, own] = -torch.inf
    rounding = 1e-6 * queries.norm(dim=1).max() * train.norm(dim=1).max()
    torch.testing.assert_close(
        found.similarity.double(), products.gather(1, found.indices), rtol=0, atol=float(rounding)
    )
    best = products.topk(40, dim=1).values
    torch.testing.assert_close(found.similarity.double(), best, rtol=0, atol=float(rounding))
    assert all(len(set(row)) == 40 for row in found.indices.tolist())
    equal = found.similarity[:, 1:] == found.similarity[:, :-1]
    assert (found.indices[:, 1:] > found.indices[:, :-1])[equal].all()
    assert equal.any() or geometry is not duplicated


def test_exact_search_distinguishes_rows_too_similar_for_bfloat16(monkeypatch):
    monkeypatch.setattr(search_module, "autocast_dtype", lambda device: torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    train = torch.nn.functional.normalize(1 + 1e-3 * torch.randn(3000, 16, generator=g), dim=1)
    queries = train[:50] + 1e-3 * torch.randn(50, 16, generator=g)
    found = exact_search(queries, train, k=20)
    best = (queries.double() @ train.double().T).topk(20, dim=1).values
    torch.testing.assert_close(found.similarity.double(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_exact_search_engines_agree_on_many_neighbors(leave_one_out):
    train, queries = clouds(5000, 0, dim=96).features, clouds(200, 1, dim=96).features
    queries, own = (train[:200], torch.arange(200)) if leave_one_out else (queries, None)
    ours, theirs = (exact_search(queries, train, k=100, exclude=own, engine=engine) for engine in ("torch", "faiss"))
    torch.testing.assert_close(ours.similarity, theirs.similarity, rtol=1e-6, atol=1e-4)
    equal = (ours.indices == theirs.indices).float().mean()
    assert equal > 0.999  # neighbors a rounding error apart may be swapped


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_exact_search_engines_agree_on_copies(engine):
    """Each row occurs four times: its copies come in index order, also across the k-th."""
    unit = torch.nn.functional.normalize(clouds(1000, 0, dim=32).features, dim=1)
    found = exact_search(unit[:50], unit.repeat(4, 1), k=10, engine=engine)
    expected = exact_search(unit[:50], unit, k=3).indices
    copies = expected[:, :, None] + 1000 * torch.arange(4)  # (50, 3, 4)
    assert torch.equal(found.indices, copies.flatten(1)[:, :10])


def test_choose_engine_depends_on_the_device(monkeypatch):
    for dtype, device, expected in [(torch.bfloat16, "cpu", "torch"), (None, "cpu", "faiss"), (None, "cuda", "torch")]:
        monkeypatch.setattr(search_module, "autocast_dtype", lambda _, dtype=dtype: dtype)
        assert search_module.choose_engine("auto", torch.device(device)) == expected
        assert [search_module.choose_engine(name, torch.device(device)) for name in ("torch", "faiss")] == [
            "torch",
            "faiss",
        ]


@pytest.mark.parametrize("k", [1, 3, 5, 20])
def test_knn_top_5_counts_classes_with_a_vote_only(k):
    train, queries = clouds(300, 0, dim=8), clouds(100, 1, dim=8)
    ranks = knn(train, queries, ks=[k], temperature=TEMPERATURE).ranks[k]
    found = search(train, queries, max_k=k)
    voted = train.labels[found.indices]  # (Q, k)
    assert torch.equal(ranks < 1 << 31, (voted == queries.labels[:, None]).any(1))
    if k == 1:  # as in DINO's evaluation, top-5 of one neighbor is top-1
        assert torch.equal(ranks < 5, ranks == 0)
    metrics = {metric.name: metric.value for metric in topk_metrics(ranks, 7)}
    assert metrics["top-5"] <= (voted == queries.labels[:, None]).any(1).double().mean()


def test_knn_counts_votes_that_vanish_in_float32():
    train = LabeledFeatures(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([3, 1]))
    query = LabeledFeatures(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert knn(train, query, ks=[2], temperature=1e-3).ranks[2].tolist() == [1]


def test_knn_equals_the_evaluation_of_dino():
    train, queries = clouds(4000, 0, dim=32), clouds(250, 1, dim=32)
    train_features, query_features = (torch.nn.functional.normalize(part.features, dim=1) for part in (train, queries))
    ks = [10, 20, 100, 200]
    theirs = probes.chunked_knn(train_features, train.labels, query_features, 7, ks=ks, temperature=TEMPERATURE)
    ours = knn(train, queries, ks=ks, temperature=TEMPERATURE).ranks
    for k in ks:
        assert torch.equal(ours[k] == 0, theirs[k] == queries.labels)


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_knn_clamps_k_to_the_number_of_images_and_warns(engine):
    train, queries = clouds(30, 0), clouds(10, 1)
    result = knn(train, queries, ks=[10, 20, 100, 200], temperature=TEMPERATURE, engine=engine)
    assert result.k_effective == {10: 10, 20: 20, 100: 30, 200: 30}
    assert result.ranks[200].tolist() == textbook_ranks(train, queries, 30)
    assert "k = 100, 200: there are only 30 neighbors" in result.warnings[0]
    assert knn(train, None, ks=[200], temperature=TEMPERATURE, engine=engine).k_effective == {200: 29}


def test_knn_warns_of_k_above_the_smallest_class():
    train = LabeledFeatures(torch.randn(17, 8), torch.tensor([0] * 12 + [1] * 5))
    (warning,) = knn(
        train, LabeledFeatures(torch.randn(3, 8), torch.zeros(3).long()), ks=[5, 10], temperature=0.1
    ).warnings
    assert "k = 10 exceeds the smallest class (5 images)" in warning
    (warning,) = knn(train, None, ks=[4, 5, 10], temperature=TEMPERATURE).warnings  # no image votes for itself
    assert "k = 5, 10 exceeds the smallest class (4 others beside an image)" in warning


def test_knn_warns_of_single_images_with_leave_one_out():
    train = LabeledFeatures(torch.randn(18, 8), torch.tensor([0] * 12 + [1] * 5 + [2]))
    first, second = knn(train, None, ks=[3, 5], temperature=TEMPERATURE).warnings
    assert "k = 5 exceeds the smallest class (4 others" in first  # of the classes that have others
    assert "1 class of a single image" in second
    (warning,) = knn(train, train, ks=[1, 3], temperature=TEMPERATURE).warnings
    assert "k = 3 exceeds the smallest class (1 image)" in warning


def test_votes_are_running_sums_without_overflow():
    similarity = torch.tensor([[0.99, 0.9, 0.9, -0.5]])
    indices = torch.tensor([[2, 0, 1, 3]])
    labels = torch.tensor([1, 1, 0, 2])
    found = list(votes(Neighbors(similarity, indices), labels, 3, ks=[1, 3, 4], temperature=0.01))
    weight = torch.exp((similarity[0].double() - 0.99) / 0.01)
    expected = [[weight[0], 0, 0], [weight[0], weight[1] + weight[2], 0], [weight[0], weight[1] + weight[2], weight[3]]]
    torch.testing.assert_close(torch.cat(found).double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-30)


def test_rank_of_true_class_prefers_the_lower_of_equal_classes():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert [int(rank_of_true_class(torch.tensor([label]), scores)) for label in range(4)] == [2, 0, 1, 3]


def test_search_finds_near_duplicates():
    train, queries = clouds(40, 0), clouds(20, 1)
    leaked = LabeledFeatures(
        torch.cat([queries.features, 3 * train.features[:4]]), torch.cat([queries.labels, train.labels[:4]])
    )
    assert len(search(train, queries, max_k=1).near_duplicates()) == 0
    assert search(train, leaked, max_k=1).near_duplicates()[:, 0].tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_knn_compares_half_precision_in_float32(dtype):
    train, queries = (LabeledFeatures(part.features.to(dtype), part.labels) for part in (clouds(200, 0), clouds(50, 1)))
    ranks = knn(train, queries, ks=[20], temperature=TEMPERATURE).ranks[20]
    assert ranks.tolist() == textbook_ranks(train, queries, 20)


def test_exact_search_ignores_the_matmul_precision():
    train, queries = clouds(400, 0, dim=128), clouds(100, 1, dim=128)
    exact = exact_search(queries.features, train.features, k=50)
    torch.set_float32_matmul_precision("medium")
    try:
        again = exact_search(queries.features, train.features, k=50)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(exact.indices, again.indices)
