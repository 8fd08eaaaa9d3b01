"""kNN equals the textbook image by image, on either engine, in any blocks, whatever the data look like."""

import pytest
import torch

from ssl_vit.evaluation.classification import knn as voting
from ssl_vit.evaluation.classification import nearest_neighbors as module
from ssl_vit.evaluation.classification.knn import LabeledFeatures, knn, rank_of_true_class, votes
from ssl_vit.evaluation.classification.nearest_neighbors import Neighbors, exact_search
from tests.reference import probes

TEMPERATURE = 0.07


def clouds(count, seed, *, dim=16, labels=(0, 1, 2, 3, 4, 5, 6)):
    """Features around one overlapping center per class."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(labels)[torch.randint(len(labels), (count,), generator=g)]
    centers = torch.randn(max(labels) + 1, dim, generator=torch.Generator().manual_seed(99))
    return LabeledFeatures(centers[chosen] + 1.5 * torch.randn(count, dim, generator=g), chosen)


def signs(count, seed, *, dim=4):
    """Corners of a cube: cosines are exact in float32, and most of them are ties."""
    g = torch.Generator().manual_seed(seed)
    corners = torch.randint(2, (count, dim), generator=g).float() * 2 - 1
    return LabeledFeatures(corners, torch.randint(3, (count,), generator=g))


def textbook_ranks(bank, queries, k, temperature=TEMPERATURE):
    """Ranks of the true classes, classes without a vote last, in their order."""
    one_set = queries is None
    queries = bank if one_set else queries
    classes = sorted(set(bank.labels.tolist()) | set(queries.labels.tolist()))
    answers = probes.knn_classes(
        queries.features.double().numpy(),
        bank.features.double().numpy(),
        bank.labels.tolist(),
        k,
        temperature,
        leave_one_out=one_set,
    )
    order = [answer + [label for label in classes if label not in answer] for answer in answers]
    return [answer.index(label) for answer, label in zip(order, queries.labels.tolist(), strict=True)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Searches of a few rows are cut into many blocks."""
    monkeypatch.setattr(module, "_QUERIES", 7)
    monkeypatch.setattr(module, "_BANK", 11)
    monkeypatch.setattr(voting, "_VOTES", 40)


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
def test_equals_the_textbook_image_by_image(engine, labels, test_labels, n_test):
    bank, queries = clouds(150, 0, labels=labels), clouds(n_test, 1, labels=test_labels)
    result = knn(bank, queries, ks=[1, 5, 20, 100], temperature=TEMPERATURE, engine=engine)
    for k, ranks in result.ranks.items():
        assert ranks.tolist() == textbook_ranks(bank, queries, k)
    assert list(result.k_effective.items()) == [(1, 1), (5, 5), (20, 20), (100, 100)]


@pytest.mark.parametrize("engine", ["auto", "torch", "faiss"])
def test_leave_one_out_equals_the_textbook(engine):
    bank = clouds(80, 0)
    result = knn(bank, None, ks=[3, 20], temperature=TEMPERATURE, engine=engine)
    for k, ranks in result.ranks.items():
        assert ranks.tolist() == textbook_ranks(bank, None, k)


@pytest.mark.parametrize("engine", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 5, 30, 59])
@pytest.mark.parametrize("one_set", [True, False])
def test_equally_near_neighbors_come_in_the_banks_order(engine, k, one_set, small_blocks):
    """60 corners of 16: each query has several neighbors of the same cosine, on both sides of the k-th place."""
    bank, queries = signs(60, 0), signs(25, 1)
    expected = probes.nearest(
        (bank if one_set else queries).features.double().numpy(),
        bank.features.double().numpy(),
        k,
        leave_one_out=one_set,
    )
    unit = bank.features / 2
    found = exact_search(
        unit if one_set else queries.features / 2, unit, k=k, own=torch.arange(60) if one_set else None, engine=engine
    )
    assert found.place.tolist() == expected
    ranks = knn(bank, None if one_set else queries, ks=[k], temperature=0.5, engine=engine).ranks[k]
    assert ranks.tolist() == textbook_ranks(bank, None if one_set else queries, k, temperature=0.5)


def test_leave_one_out_finds_exact_copies_but_never_the_image_itself():
    bank = clouds(30, 0)
    bank = LabeledFeatures(bank.features.repeat(2, 1), bank.labels.repeat(2))
    unit = torch.nn.functional.normalize(bank.features, dim=1)
    found = exact_search(unit, unit, k=5, own=torch.arange(60))
    assert (found.place[:, 0] == (torch.arange(60) + 30) % 60).all()
    assert not (found.place == torch.arange(60)[:, None]).any()
    result = knn(bank, None, ks=[1], temperature=TEMPERATURE)
    assert result.near_duplicates == 60
    assert (result.ranks[1] == 0).all()


def test_blocks_do_not_change_the_neighbors(monkeypatch):
    bank, queries = clouds(500, 0, dim=64), clouds(90, 1, dim=64)
    whole = exact_search(queries.features, bank.features, k=40)
    monkeypatch.setattr(module, "_QUERIES", 32)
    for block in (16, 100, 499):  # narrower than k, uneven, one row left over
        monkeypatch.setattr(module, "_BANK", block)
        found = exact_search(queries.features, bank.features, k=40)
        torch.testing.assert_close(found.similarity, whole.similarity)
        assert torch.equal(found.place, whole.place)


@pytest.fixture
def by_bfloat16(monkeypatch):
    """Small searches too begin in bfloat16, and none that does falls back on all products."""
    monkeypatch.setattr(module, "autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(module, "_ROOMY", 2)
    monkeypatch.setattr(module, "_plain", lambda *_: pytest.fail("all products were computed"))


def unlike(bank, queries):
    return bank, queries


def far_from_the_origin(bank, queries):
    return bank + 3, queries + 3


def of_any_length(bank, queries):
    return bank * torch.linspace(0.1, 10, len(bank))[:, None], queries * 100


def every_row_twice(bank, queries):
    return bank[: len(bank) // 2].repeat(2, 1), queries


@pytest.mark.parametrize("geometry", [unlike, far_from_the_origin, of_any_length, every_row_twice])
@pytest.mark.parametrize("block", [1500, 65536])
@pytest.mark.parametrize("one_set", [True, False])
def test_a_search_that_begins_in_bfloat16_finds_the_nearest_in_float64(
    geometry, block, one_set, by_bfloat16, monkeypatch
):
    """Rows a rounding error of float32 apart may change places, no others."""
    monkeypatch.setattr(module, "_BANK", block)
    bank, queries = geometry(clouds(3000, 0, dim=48).features, clouds(300, 1, dim=48).features)
    own = torch.arange(300) if one_set else None
    queries = bank[:300] if one_set else queries
    found = exact_search(queries, bank, k=40, own=own)

    products = queries.double() @ bank.double().T
    if one_set:
        products[own, own] = -torch.inf
    rounding = 1e-6 * queries.norm(dim=1).max() * bank.norm(dim=1).max()
    torch.testing.assert_close(found.similarity.double(), products.gather(1, found.place), rtol=0, atol=float(rounding))
    best = products.topk(40, dim=1).values
    torch.testing.assert_close(found.similarity.double(), best, rtol=0, atol=float(rounding))
    assert all(len(set(row)) == 40 for row in found.place.tolist())
    equal = found.similarity[:, 1:] == found.similarity[:, :-1]
    assert (found.place[:, 1:] > found.place[:, :-1])[equal].all()
    assert equal.any() or geometry is not every_row_twice


def test_rows_too_alike_for_bfloat16_are_told_apart_all_the_same(monkeypatch):
    monkeypatch.setattr(module, "autocast_dtype", lambda device: torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(1 + 1e-3 * torch.randn(3000, 16, generator=g), dim=1)
    queries = bank[:50] + 1e-3 * torch.randn(50, 16, generator=g)
    found = exact_search(queries, bank, k=20)
    best = (queries.double() @ bank.double().T).topk(20, dim=1).values
    torch.testing.assert_close(found.similarity.double(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("one_set", [True, False])
def test_engines_agree_on_many_neighbors(one_set):
    bank, queries = clouds(5000, 0, dim=96).features, clouds(200, 1, dim=96).features
    queries, own = (bank[:200], torch.arange(200)) if one_set else (queries, None)
    ours, theirs = (exact_search(queries, bank, k=100, own=own, engine=engine) for engine in ("torch", "faiss"))
    torch.testing.assert_close(ours.similarity, theirs.similarity, rtol=1e-6, atol=1e-4)
    equal = (ours.place == theirs.place).float().mean()
    assert equal > 0.999  # neighbors a rounding error apart may change places


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_engines_agree_on_copies(engine):
    """Each row stands in the bank four times: its copies come in the bank's order, also across the k-th place."""
    unit = torch.nn.functional.normalize(clouds(1000, 0, dim=32).features, dim=1)
    found = exact_search(unit[:50], unit.repeat(4, 1), k=10, engine=engine)
    expected = exact_search(unit[:50], unit, k=3).place
    copies = expected[:, :, None] + 1000 * torch.arange(4)  # (50, 3, 4)
    assert torch.equal(found.place, copies.flatten(1)[:, :10])


def test_the_engine_follows_from_the_device(monkeypatch):
    for dtype, device, expected in [(torch.bfloat16, "cpu", "torch"), (None, "cpu", "faiss"), (None, "cuda", "torch")]:
        monkeypatch.setattr(module, "autocast_dtype", lambda _, dtype=dtype: dtype)
        assert module.choose_engine("auto", torch.device(device)) == expected
        assert [module.choose_engine(name, torch.device(device)) for name in ("torch", "faiss")] == ["torch", "faiss"]


def test_answers_are_those_of_dinos_evaluation():
    bank, queries = clouds(4000, 0, dim=32), clouds(250, 1, dim=32)
    known, asked = (torch.nn.functional.normalize(part.features, dim=1) for part in (bank, queries))
    ks = [10, 20, 100, 200]
    theirs = probes.chunked_knn(known, bank.labels, asked, 7, ks=ks, temperature=TEMPERATURE)
    ours = knn(bank, queries, ks=ks, temperature=TEMPERATURE).ranks
    for k in ks:
        assert torch.equal(ours[k] == 0, theirs[k] == queries.labels)


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_k_above_the_number_of_images_lets_all_vote_and_says_so(engine):
    bank, queries = clouds(30, 0), clouds(10, 1)
    result = knn(bank, queries, ks=[10, 20, 100, 200], temperature=TEMPERATURE, engine=engine)
    assert result.k_effective == {10: 10, 20: 20, 100: 30, 200: 30}
    assert result.ranks[200].tolist() == textbook_ranks(bank, queries, 30)
    assert "k = 100, 200: there are only 30 neighbors" in result.warnings[0]
    assert knn(bank, None, ks=[200], temperature=TEMPERATURE, engine=engine).k_effective == {200: 29}


def test_k_above_the_smallest_class_is_warned_of():
    bank = LabeledFeatures(torch.randn(17, 8), torch.tensor([0] * 12 + [1] * 5))
    (warning,) = knn(
        bank, LabeledFeatures(torch.randn(3, 8), torch.zeros(3).long()), ks=[5, 10], temperature=0.1
    ).warnings
    assert "k = 10 exceeds the smallest class (5 images)" in warning
    (warning,) = knn(bank, None, ks=[4, 5, 10], temperature=TEMPERATURE).warnings  # no image votes for itself
    assert "k = 5, 10 exceeds the smallest class (4 others beside an image)" in warning


def test_an_image_alone_in_its_class_is_warned_of_where_it_is_left_out():
    bank = LabeledFeatures(torch.randn(18, 8), torch.tensor([0] * 12 + [1] * 5 + [2]))
    first, second = knn(bank, None, ks=[3, 5], temperature=TEMPERATURE).warnings
    assert "k = 5 exceeds the smallest class (4 others" in first  # of the classes that have others
    assert "classes of a single image: 1;" in second
    (warning,) = knn(bank, bank, ks=[1, 3], temperature=TEMPERATURE).warnings
    assert "k = 3 exceeds the smallest class (1 images)" in warning


def test_votes_are_running_sums_and_do_not_overflow():
    similarity = torch.tensor([[0.99, 0.9, 0.9, -0.5]])
    place = torch.tensor([[2, 0, 1, 3]])
    labels = torch.tensor([1, 1, 0, 2])
    found = list(votes(Neighbors(similarity, place), labels, 3, ks=[1, 3, 4], temperature=0.01))
    weight = torch.exp((similarity[0].double() - 0.99) / 0.01)
    expected = [[weight[0], 0, 0], [weight[0], weight[1] + weight[2], 0], [weight[0], weight[1] + weight[2], weight[3]]]
    torch.testing.assert_close(torch.cat(found).double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-30)


def test_of_equally_voted_classes_the_lower_is_answered():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert [int(rank_of_true_class(torch.tensor([label]), scores)) for label in range(4)] == [2, 0, 1, 3]


def test_near_duplicates_between_the_sets_are_counted():
    bank, queries = clouds(40, 0), clouds(20, 1)
    leaked = LabeledFeatures(
        torch.cat([queries.features, 3 * bank.features[:4]]), torch.cat([queries.labels, bank.labels[:4]])
    )
    assert knn(bank, queries, ks=[1], temperature=TEMPERATURE).near_duplicates == 0
    assert knn(bank, leaked, ks=[1], temperature=TEMPERATURE).near_duplicates == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_halves_are_compared_in_float32(dtype):
    bank, queries = (LabeledFeatures(part.features.to(dtype), part.labels) for part in (clouds(200, 0), clouds(50, 1)))
    ranks = knn(bank, queries, ks=[20], temperature=TEMPERATURE).ranks[20]
    assert ranks.tolist() == textbook_ranks(bank, queries, 20)


def test_reduced_precision_of_training_does_not_reach_the_search():
    bank, queries = clouds(400, 0, dim=128), clouds(100, 1, dim=128)
    exact = exact_search(queries.features, bank.features, k=50)
    torch.set_float32_matmul_precision("medium")
    try:
        again = exact_search(queries.features, bank.features, k=50)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(exact.place, again.place)
