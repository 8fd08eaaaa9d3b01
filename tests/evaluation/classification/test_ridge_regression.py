"""Ridge regression equals its textbook form and scikit-learn; leave-one-out equals refits."""

import pytest
import torch
import torch.nn.functional as F

from ssl_vit.evaluation.classification import linear_classifier
from ssl_vit.evaluation.classification.ridge_regression import best_ridge, leave_one_out, ridge_path, selection_score
from tests.reference import probes

L2 = [1e1, 1e-2, 1e-5]


def make_data(count, dim, *, classes=3, seed=0):
    """Return features of very different scale and mean (float64), with every class at least once."""
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


def with_duplicates(x, labels):
    return torch.cat([x, x[:7]]), torch.cat([labels, labels[:7]])


def with_constants(x, labels):
    return torch.cat([x, torch.full((len(x), 3), 0.1, dtype=x.dtype)], dim=1), labels


def with_an_outlier(x, labels):
    """Append a feature that is nonzero for one image only."""
    return torch.cat([x, F.one_hot(torch.tensor(4), len(x))[:, None].to(x.dtype)], dim=1), labels


DATA = {
    "many": make_data(40, 6),
    "few": make_data(9, 30),
    "as many as features": make_data(20, 20),
    "two classes": make_data(25, 4, classes=2),
    "one of each class": make_data(5, 12, classes=5),
    "two images": make_data(2, 3, classes=2),
    "a class of one": make_data(13, 4, classes=4),
    "duplicates": with_duplicates(*make_data(30, 5)),
    "duplicates, few": with_duplicates(*make_data(12, 40)),
    "constants": with_constants(*make_data(30, 5)),
    "an outlier": with_an_outlier(*make_data(30, 5)),
    "an outlier, few": with_an_outlier(*make_data(12, 40)),
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_leave_one_outs_are_of_probes_fitted_without_the_image(data):
    x, labels = data
    classes = int(labels.max()) + 2  # one of them without an image
    z, targets = standardized(x), coded(labels, classes)
    for fit in ridge_path(x, labels, classes=classes, l2=L2):
        refitted = probes.ridge_leave_one_out(z, targets, len(z) * fit.l2)
        torch.testing.assert_close(fit.loo_scores, refitted, rtol=1e-8, atol=1e-8)
        score = leave_one_out(fit, labels)
        assert score.accuracy == pytest.approx(float((refitted.argmax(1) == labels).double().mean()))
        assert score.error == pytest.approx(float((refitted - targets).square().sum(1).mean()), rel=1e-6)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_ridge_path_equals_scikit_learn(data):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = data
    z, classes = standardized(x), int(labels.max()) + 1
    for fit in ridge_path(x, labels, classes=classes, l2=L2):
        theirs = linear_model.Ridge(alpha=len(z) * fit.l2, solver="svd").fit(z, coded(labels, classes))
        expected = torch.from_numpy(theirs.predict(z))
        torch.testing.assert_close(fit.probe.logits(x), expected, rtol=1e-8, atol=1e-8)
        classifier = linear_model.RidgeClassifier(alpha=len(z) * fit.l2, solver="svd").fit(z, labels)
        assert fit.probe.logits(x).argmax(dim=1).tolist() == classifier.predict(z).tolist()


def test_ridge_path_by_features_equals_by_images():
    """Constant features get weight 0, but make the features more than the images, which selects the other solver."""
    x, labels = make_data(30, 8)
    padded = torch.cat([x, torch.full((30, 40), 7.0, dtype=x.dtype)], dim=1)
    new = torch.randn(10, 8, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    elsewhere = torch.cat([new, torch.full((10, 40), -100.0, dtype=x.dtype)], dim=1)
    both = (ridge_path(data, labels, classes=3, l2=L2) for data in (x, padded))
    for plain, other in zip(*both, strict=True):
        torch.testing.assert_close(other.loo_scores, plain.loo_scores, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.probe.logits(elsewhere), plain.probe.logits(new), rtol=1e-9, atol=1e-9)


def test_ridge_path_is_invariant_to_scale_and_duplication():
    x, labels = make_data(30, 8)
    for fit, moved, doubled in zip(
        ridge_path(x, labels, classes=3, l2=L2),
        ridge_path(x * torch.logspace(-9, 9, 8), labels, classes=3, l2=L2),
        ridge_path(torch.cat([x, x]), torch.cat([labels, labels]), classes=3, l2=L2),
        strict=True,
    ):
        torch.testing.assert_close(moved.loo_scores, fit.loo_scores, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(doubled.probe.weight, fit.probe.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [6, 60])
def test_ridge_path_computes_half_precision_in_float64(dtype, dim):
    x, labels = make_data(30, dim)
    narrow = x.to(dtype)
    ((found,), (exact,)) = (list(ridge_path(f, labels, classes=3, l2=[1e-2])) for f in (narrow, narrow.double()))
    assert torch.equal(found.loo_scores, exact.loo_scores)
    assert found.probe.weight.dtype == torch.float32
    torch.testing.assert_close(found.probe.logits(narrow.float()), exact.probe.logits(narrow.double()).float())


@pytest.mark.parametrize("dim", [6, 60])
def test_ridge_path_does_not_depend_on_the_chunk_size(dim, monkeypatch):
    x, labels = make_data(30, dim)
    whole = list(ridge_path(x, labels, classes=3, l2=L2))
    monkeypatch.setattr(linear_classifier, "_ROWS", 7)
    for fit, plain in zip(ridge_path(x, labels, classes=3, l2=L2), whole, strict=True):
        torch.testing.assert_close(fit.loo_scores, plain.loo_scores, rtol=1e-9, atol=1e-9)


def test_ridge_path_scores_a_class_without_images_minus_one():
    x, labels = make_data(30, 8)
    for fit in ridge_path(x, 2 * labels, classes=5, l2=L2):
        assert torch.allclose(fit.loo_scores[:, [1, 3]], torch.tensor(-1.0, dtype=torch.float64))
        assert torch.allclose(fit.probe.logits(x)[:, [1, 3]], torch.tensor(-1.0, dtype=torch.float64))


def test_ridge_path_goes_from_strong_to_weak_penalties():
    assert [fit.l2 for fit in ridge_path(*make_data(20, 3), classes=3, l2=[1e-5, 1e1, 1e-2])] == [1e1, 1e-2, 1e-5]


def test_best_ridge_has_the_highest_leave_one_out_accuracy():
    x, labels = make_data(60, 30)
    fits = list(ridge_path(x, labels, classes=3, l2=L2))
    accuracies = [float((fit.loo_scores.argmax(dim=1) == labels).double().mean()) for fit in fits]
    assert len(set(accuracies)) > 1
    assert best_ridge(fits, labels).l2 == fits[accuracies.index(max(accuracies))].l2


def test_selection_score_uses_the_error_for_classes_of_one_image():
    x, labels = make_data(13, 4, classes=4)
    fits = list(ridge_path(x, labels, classes=4, l2=L2))
    single = torch.cat([labels[:-1], torch.tensor([4])])
    score = leave_one_out(fits[0], labels)
    assert selection_score(score, labels) == (score.accuracy, -score.error)
    assert selection_score(score, single) == (0.0, -score.error)
    once = list(ridge_path(x[:4], labels[:4], classes=4, l2=L2))
    errors = [float((fit.loo_scores - coded(labels[:4], 4)).square().sum()) for fit in once]
    assert best_ridge(once, labels[:4]).l2 == once[errors.index(min(errors))].l2
