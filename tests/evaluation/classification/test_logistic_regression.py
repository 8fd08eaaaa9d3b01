"""Logistic regression reaches the minimum of its loss, also on badly conditioned features."""

import pytest
import torch
import torch.nn.functional as F

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification import linear_classifier
from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant
from ssl_vit.evaluation.classification.logistic_regression import FINAL_TOLERANCE, logistic_path, standard_space
from ssl_vit.evaluation.features.extractor import BackboneExtractor, extract
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone
from tests.reference import probes


def correlated(count, *, dim=6, classes=4, seed=0):
    """Return features like a model's: one direction has nearly all variance, means are not zero, classes overlap."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -2, dim)[:, None]
    labels = torch.randint(classes, (count,), generator=g)
    hidden = torch.randn(count, dim, generator=g)
    hidden[:, :classes] += 1.2 * F.one_hot(labels, classes)
    return hidden @ mixing + 3, labels


@pytest.mark.parametrize(("count", "dim", "classes"), [(300, 6, 4), (60, 10, 2), (40, 12, 5), (20, 30, 3)])
def test_logistic_path_losses_equal_newtons_method(count, dim, classes):
    x, labels = correlated(count, dim=dim, classes=classes)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    for l2, found in logistic_path(standard_space(x), labels, classes=classes, l2=[1e-5, 1e-1, 1e-3]):
        loss = F.cross_entropy(found.logits(x), labels) + l2 / 2 * found.weight.square().sum()
        assert float(loss) == pytest.approx(probes.logistic_loss(x, labels, classes, l2), abs=1e-4)
        torch.testing.assert_close(found.logits(x), standard @ found.weight + found.bias, rtol=1e-3, atol=1e-3)


def test_logistic_path_goes_from_strong_to_weak_penalties():
    x, labels = correlated(50)
    assert [l2 for l2, _ in logistic_path(standard_space(x), labels, classes=4, l2=[1e-5, 1e-1, 1e-3])] == [
        1e-1,
        1e-3,
        1e-5,
    ]


def test_logistic_path_ignores_constant_features():
    x, labels = correlated(200)
    padded = torch.cat([x, torch.full((200, 2), 5.0)], dim=1)
    ((_, plain),) = logistic_path(standard_space(x), labels, classes=4, l2=[1e-3])
    ((_, found),) = logistic_path(standard_space(padded), labels, classes=4, l2=[1e-3])
    elsewhere = padded + torch.tensor([0.0] * x.shape[1] + [100.0, -100.0])
    torch.testing.assert_close(found.logits(elsewhere), plain.logits(x), rtol=1e-3, atol=1e-3)


def scikit_learn_loss(x, labels, l2):
    """Return the minimum that scikit-learn finds on standardized features, in float64."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    std = x.std(0, correction=0)
    z = torch.where(std > 1e-6 * x.mean(0).abs(), (x - x.mean(0)) / std, 0)
    two = len(labels.unique()) == 2  # it fits one weight w there, of which ours are -w / 2 and w / 2
    model = linear_model.LogisticRegression(C=(1 + two) / (len(z) * l2), tol=1e-7, max_iter=10_000).fit(z, labels)
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if two:
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return float(F.cross_entropy(z @ weight.T + bias, labels) + l2 / 2 * weight.square().sum())


def loss_of(probe, x, labels, l2):
    exact = type(probe)(*(part.double() for part in probe))
    return float(F.cross_entropy(exact.logits(x.double()), labels) + l2 / 2 * exact.weight.square().sum())


def assert_as_good_as_scikit_learn(x, labels, *, tolerance=1e-4):
    classes = int(labels.max()) + 1
    space = standard_space(x)
    for l2, probe in logistic_path(space, labels, classes=classes, l2=[1e-1, 1e-3, 1e-5]):
        best = scikit_learn_loss(x.double(), labels, l2)
        assert loss_of(probe, x, labels, l2) == pytest.approx(best, abs=tolerance)
        ((_, alone),) = logistic_path(space, labels, classes=classes, l2=[l2], tolerance=FINAL_TOLERANCE)
        assert loss_of(alone, x, labels, l2) == pytest.approx(best, abs=tolerance / 10)  # without the warm start


def collinear():
    x, labels = correlated(200, dim=8)
    g = torch.Generator().manual_seed(1)
    return torch.cat(
        [x, x + 1e-4 * torch.randn(x.shape, generator=g), x[:, :3] @ torch.randn(3, 6, generator=g)], 1
    ), labels


def different_scales():
    x, labels = correlated(200, dim=12)
    return (x - x.mean(0)) * torch.logspace(-8, 8, 12), labels


def duplicates():
    x, labels = correlated(40)
    return x.repeat(5, 1), labels.repeat(5)


def constants():
    x, labels = correlated(100)
    return torch.cat([x, torch.full((100, 3), 0.1), torch.zeros(100, 2)], dim=1), labels


BADLY_CONDITIONED = {
    "collinear": collinear(),
    "different scales": different_scales(),
    "fewer images than features": correlated(40, dim=90),
    "one image per class": (correlated(4, dim=30)[0], torch.arange(4)),
    "two classes": correlated(100, classes=2),
    "duplicates": duplicates(),
    "constants": constants(),
}


@pytest.mark.parametrize("data", BADLY_CONDITIONED.values(), ids=BADLY_CONDITIONED.keys())
def test_logistic_path_equals_scikit_learn_on_badly_conditioned_features(data):
    assert_as_good_as_scikit_learn(*data)


def test_logistic_path_equals_scikit_learn_on_real_images(cifar, tmp_path):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "in_chans": 3, "reg_tokens": 0, "embed_dim": 48, "depth": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes)
    half = [0.5, 0.5, 0.5]
    loaded = LoadedBackbone(Backbone(config).requires_grad_(False).eval(), half, half, "a model", None, None)
    dataset, transform = scan_image_folder(cifar / "train"), EvalTransform(32, 0.875, half, half)
    settings = {
        "batch_size": 256,
        "num_workers": 0,
        "skipped": SkippedImageLog(tmp_path / "skipped_images.txt"),
        "show": False,
    }
    features = extract(BackboneExtractor(loaded, transform, blocks=1), dataset, **settings)
    assert_as_good_as_scikit_learn(FeatureVariant(1, True).of(features), features.labels)


def test_logistic_path_ignores_masked_images():
    """Except in the standardization, which uses all images."""
    x, labels = correlated(200)
    mask = torch.arange(200) % 3 > 0
    space = standard_space(x)
    ((_, found),) = logistic_path(space, labels, classes=4, l2=[1e-3], mask=mask)
    ((_, other),) = logistic_path(space, torch.where(mask, labels, 0), classes=4, l2=[1e-3], mask=mask)
    assert torch.equal(found.weight, other.weight)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    linear_model = pytest.importorskip("sklearn.linear_model")
    theirs = linear_model.LogisticRegression(C=1 / (int(mask.sum()) * 1e-3), tol=1e-9, max_iter=9999)
    theirs.fit(z[mask], labels[mask])
    expected = torch.from_numpy(theirs.predict_proba(z))
    torch.testing.assert_close(found.logits(x).softmax(dim=1).double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dim", [6, 60])
def test_logistic_path_computes_half_precision_in_float32(dim):
    x, labels = correlated(50, dim=dim)
    paths = (logistic_path(standard_space(f), labels, classes=4, l2=[1e-2]) for f in (x.half(), x.half().float()))
    ((_, narrow),), ((_, wide),) = paths
    assert torch.equal(narrow.logits(x), wide.logits(x))


@pytest.mark.parametrize("dim", [6, 60])
def test_standard_space_does_not_depend_on_the_chunk_size(dim, monkeypatch):
    x, _ = correlated(50, dim=dim)
    space = standard_space(x)
    monkeypatch.setattr(linear_classifier, "_ROWS", 7)
    chunks = standard_space(x)
    assert torch.equal(chunks.standard.mean, space.standard.mean)
    torch.testing.assert_close(chunks.axes @ chunks.x, space.axes @ space.x, rtol=1e-4, atol=1e-4)
