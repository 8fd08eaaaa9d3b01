"""Ridge probes are those of a textbook, and the scores left out those of probes that never saw the image."""

import pytest
import torch
import torch.nn.functional as F

from ssl_vit.evaluation.classification import linear_classifier as module
from ssl_vit.evaluation.classification.ridge_regression import best_ridge, left_out_score, ridge_path, selection_score
from tests.reference import probes

L2 = [1e1, 1e-2, 1e-5]


def dataset(count, dim, *, classes=3, seed=0):
    """Features of very different size and place (float64), and every class at least once."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    hidden = torch.randn(count, dim, generator=g, dtype=torch.float64)
    hidden[:, :classes] += F.one_hot(labels, classes)[:, :dim]
    return hidden @ torch.randn(dim, dim, generator=g, dtype=torch.float64) * torch.logspace(2, -2, dim) + 5, labels


def standardized(x):
    std = x.std(0, correction=0)
    return torch.where(std > 1e-9, (x - x.mean(0)) / std, 0)


def coded(labels, classes):
    return 2.0 * F.one_hot(labels, classes).double() - 1


def with_twins(x, labels):
    return torch.cat([x, x[:7]]), torch.cat([labels, labels[:7]])


def with_constants(x, labels):
    return torch.cat([x, torch.full((len(x), 3), 0.1, dtype=x.dtype)], dim=1), labels


def with_an_outlier(x, labels):
    """One feature that is not zero for one image only."""
    return torch.cat([x, F.one_hot(torch.tensor(4), len(x))[:, None].to(x.dtype)], dim=1), labels


DATA = {
    "many": dataset(40, 6),
    "few": dataset(9, 30),
    "as many as features": dataset(20, 20),
    "two classes": dataset(25, 4, classes=2),
    "one of each class": dataset(5, 12, classes=5),
    "two images": dataset(2, 3, classes=2),
    "a class of one": dataset(13, 4, classes=4),
    "twins": with_twins(*dataset(30, 5)),
    "twins, few": with_twins(*dataset(12, 40)),
    "constants": with_constants(*dataset(30, 5)),
    "an outlier": with_an_outlier(*dataset(30, 5)),
    "an outlier, few": with_an_outlier(*dataset(12, 40)),
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_left_out_scores_are_of_probes_fitted_without_the_image(data):
    x, labels = data
    classes = int(labels.max()) + 2  # one of them without an image
    z, targets = standardized(x), coded(labels, classes)
    for fit in ridge_path(x, labels, classes=classes, l2=L2):
        refitted = probes.ridge_left_out(z, targets, len(z) * fit.l2)
        torch.testing.assert_close(fit.left_out, refitted, rtol=1e-8, atol=1e-8)
        score = left_out_score(fit, labels)
        assert score.accuracy == pytest.approx(float((refitted.argmax(1) == labels).double().mean()))
        assert score.error == pytest.approx(float((refitted - targets).square().sum(1).mean()), rel=1e-6)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_probes_are_scikit_learns(data):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = data
    z, classes = standardized(x), int(labels.max()) + 1
    for fit in ridge_path(x, labels, classes=classes, l2=L2):
        theirs = linear_model.Ridge(alpha=len(z) * fit.l2, solver="svd").fit(z, coded(labels, classes))
        expected = torch.from_numpy(theirs.predict(z))
        torch.testing.assert_close(fit.probe.logits(x), expected, rtol=1e-8, atol=1e-8)
        classifier = linear_model.RidgeClassifier(alpha=len(z) * fit.l2, solver="svd").fit(z, labels)
        assert fit.probe.logits(x).argmax(dim=1).tolist() == classifier.predict(z).tolist()


def test_both_ways_to_the_solution_agree():
    """Constant features have no say, but make the features more than the images: the other way is taken."""
    x, labels = dataset(30, 8)
    padded = torch.cat([x, torch.full((30, 40), 7.0, dtype=x.dtype)], dim=1)
    new = torch.randn(10, 8, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    elsewhere = torch.cat([new, torch.full((10, 40), -100.0, dtype=x.dtype)], dim=1)
    both = (ridge_path(data, labels, classes=3, l2=L2) for data in (x, padded))
    for plain, other in zip(*both, strict=True):
        torch.testing.assert_close(other.left_out, plain.left_out, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.probe.logits(elsewhere), plain.probe.logits(new), rtol=1e-9, atol=1e-9)


def test_size_and_place_of_features_and_number_of_images_do_not_matter():
    x, labels = dataset(30, 8)
    for fit, moved, doubled in zip(
        ridge_path(x, labels, classes=3, l2=L2),
        ridge_path(x * torch.logspace(-9, 9, 8), labels, classes=3, l2=L2),
        ridge_path(torch.cat([x, x]), torch.cat([labels, labels]), classes=3, l2=L2),
        strict=True,
    ):
        torch.testing.assert_close(moved.left_out, fit.left_out, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(doubled.probe.weight, fit.probe.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [6, 60])
def test_narrow_features_are_computed_with_in_double(dtype, dim):
    x, labels = dataset(30, dim)
    narrow = x.to(dtype)
    ((found,), (exact,)) = (list(ridge_path(f, labels, classes=3, l2=[1e-2])) for f in (narrow, narrow.double()))
    assert torch.equal(found.left_out, exact.left_out)
    assert found.probe.weight.dtype == torch.float32
    torch.testing.assert_close(found.probe.logits(narrow.float()), exact.probe.logits(narrow.double()).float())


@pytest.mark.parametrize("dim", [6, 60])
def test_features_taken_some_rows_at_a_time_give_the_same(dim, monkeypatch):
    x, labels = dataset(30, dim)
    whole = list(ridge_path(x, labels, classes=3, l2=L2))
    monkeypatch.setattr(module, "_ROWS", 7)
    for fit, plain in zip(ridge_path(x, labels, classes=3, l2=L2), whole, strict=True):
        torch.testing.assert_close(fit.left_out, plain.left_out, rtol=1e-9, atol=1e-9)


def test_a_class_without_images_scores_minus_one():
    x, labels = dataset(30, 8)
    for fit in ridge_path(x, 2 * labels, classes=5, l2=L2):
        assert torch.allclose(fit.left_out[:, [1, 3]], torch.tensor(-1.0, dtype=torch.float64))
        assert torch.allclose(fit.probe.logits(x)[:, [1, 3]], torch.tensor(-1.0, dtype=torch.float64))


def test_path_goes_from_strong_to_weak_penalties():
    assert [fit.l2 for fit in ridge_path(*dataset(20, 3), classes=3, l2=[1e-5, 1e1, 1e-2])] == [1e1, 1e-2, 1e-5]


def test_the_best_fit_answers_most_images_without_having_seen_them():
    x, labels = dataset(60, 30)
    fits = list(ridge_path(x, labels, classes=3, l2=L2))
    accuracies = [float((fit.left_out.argmax(dim=1) == labels).double().mean()) for fit in fits]
    assert len(set(accuracies)) > 1
    assert best_ridge(fits, labels).l2 == fits[accuracies.index(max(accuracies))].l2


def test_where_a_class_has_one_image_the_error_alone_decides():
    x, labels = dataset(13, 4, classes=4)
    fits = list(ridge_path(x, labels, classes=4, l2=L2))
    lonely = torch.cat([labels[:-1], torch.tensor([4])])
    score = left_out_score(fits[0], labels)
    assert selection_score(score, labels) == (score.accuracy, -score.error)
    assert selection_score(score, lonely) == (0.0, -score.error)
    once = list(ridge_path(x[:4], labels[:4], classes=4, l2=L2))
    errors = [float((fit.left_out - coded(labels[:4], 4)).square().sum()) for fit in once]
    assert best_ridge(once, labels[:4]).l2 == once[errors.index(min(errors))].l2
