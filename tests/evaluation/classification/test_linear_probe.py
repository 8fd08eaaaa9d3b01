"""The linear probe: selection without test images, refit on all, any labels, with every solver."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, Standardizer, stratified
from ssl_vit.evaluation.classification.linear_probe import SGD, Logistic, Ridge, linear_probe
from ssl_vit.evaluation.classification.sgd_classifiers import Schedule
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.runtime.errors import UserError
from tests.reference import probes

L2 = [1e-1, 1e-3, 1e-5]
SCHEDULE = Schedule(epochs=10, batch_size=32, seed=0)
SOLVERS = {
    "logistic": Logistic(L2, val_fraction=0.1, seed=0),
    "ridge": Ridge(L2),
    "sgd": SGD([1e-2, 1e-1], [0.0, 1e-2], SCHEDULE, val_fraction=0.1),
}
VARIANTS = [FeatureVariant(1, False), FeatureVariant(1, True), FeatureVariant(2, False), FeatureVariant(2, True)]
CPU = torch.device("cpu")


def features_of(count, seed, *, informative="both", labels=(0, 1, 2)):
    """Return two blocks of 8 and a patch mean of 8; the classes differ in the chosen part."""
    g = torch.Generator().manual_seed(seed)
    encoded = torch.randint(len(labels), (count,), generator=g)
    parts = torch.randn(3, count, 8, generator=g)  # earlier block, last block, patch mean
    parts_with_classes = {"earlier": [0], "last": [1], "mean": [2], "both": [0, 1], "none": []}[informative]
    for part in parts_with_classes:
        parts[part, :, : len(labels)] += 2 * F.one_hot(encoded, len(labels))
    return Features(
        parts[:2].transpose(0, 1).contiguous(), parts[2], torch.tensor(labels)[encoded], torch.arange(count)
    )


def probe(train, test, solver, *, variants=VARIANTS):
    solver = SOLVERS[solver] if isinstance(solver, str) else solver
    return linear_probe(train, test, variants=variants, solver=solver, device=CPU)


def parametrize_solvers(solvers=SOLVERS):
    return pytest.mark.parametrize("solver", solvers)


def test_feature_variant_selects_last_blocks_and_patch_mean():
    features = Features(torch.arange(24.0).view(2, 3, 4), torch.arange(8.0).view(2, 4), torch.zeros(2), torch.zeros(2))
    assert torch.equal(FeatureVariant(1, False).of(features), features.cls[:, 2])
    assert torch.equal(FeatureVariant(2, False).of(features), features.cls[:, 1:].flatten(1))
    assert torch.equal(
        FeatureVariant(3, True).of(features), torch.cat([features.cls.flatten(1), features.patch_mean], 1)
    )


@parametrize_solvers()
@pytest.mark.parametrize(
    ("informative", "blocks", "patch_mean"), [("earlier", 2, None), ("mean", None, True), ("last", None, None)]
)
def test_linear_probe_selects_the_informative_features(informative, blocks, patch_mean, solver):
    train, test = features_of(600, 0, informative=informative), features_of(300, 1, informative=informative)
    result = probe(train, test, solver)
    assert blocks in (None, result.chosen.variant.blocks)
    assert patch_mean in (None, result.chosen.variant.patch_mean)
    assert (result.ranks == 0).float().mean() > 0.8
    assert torch.equal(result.ranks == 0, result.predicted == test.labels)
    assert result.chosen == max(result.candidates, key=lambda candidate: (candidate.accuracy, -candidate.loss))
    settings = [(str(candidate.variant), *candidate.settings.values()) for candidate in result.candidates]
    assert len(set(settings)) == len(settings) == len(VARIANTS) * (4 if solver == "sgd" else len(L2))


@parametrize_solvers()
def test_linear_probe_does_not_select_on_test_images(solver):
    """Other test labels and features change only the score."""
    train, test = features_of(200, 0), features_of(100, 10)
    result = probe(train, test, solver)
    g = torch.Generator().manual_seed(0)
    shuffled = replace(test, labels=test.labels[torch.randperm(100, generator=g)])
    noise = replace(test, cls=torch.randn(test.cls.shape, generator=g))
    for other in (shuffled, noise):
        again = probe(train, other, solver)
        assert again.candidates == result.candidates
        assert again.chosen == result.chosen
        assert (again.ranks == 0).sum() < (result.ranks == 0).sum()


@parametrize_solvers()
def test_linear_probe_refits_on_all_training_images(solver):
    train = features_of(60, 0)
    result = probe(train, train, solver, variants=[FeatureVariant(2, False)])
    x = train.cls.flatten(1).double()
    z = (x - x.mean(0)) / x.std(0, correction=0)
    logits = result.probe.logits(train.cls.flatten(1))
    l2 = result.chosen.settings.get("l2")
    if solver == "logistic":
        loss = F.cross_entropy(logits, train.labels) + l2 / 2 * result.probe.weight.square().sum()
        assert float(loss) == pytest.approx(probes.logistic_loss(x, train.labels, 3, l2), abs=1e-5)
    elif solver == "ridge":
        table = torch.from_numpy(probes.ridge(z, 2 * F.one_hot(train.labels, 3) - 1, 60 * l2))
        torch.testing.assert_close(logits.double(), z @ table[:-1] + table[-1], rtol=1e-4, atol=1e-4)
    else:
        g = torch.Generator().manual_seed(0)
        batches = [part for _ in range(10) for part in torch.randperm(60, generator=g).tensor_split(2)]
        head = probes.sgd_head(z, train.labels, 3, **result.chosen.settings, batches=batches)
        torch.testing.assert_close(logits.double(), head(z), rtol=1e-4, atol=1e-4)


@parametrize_solvers()
def test_linear_probe_accepts_any_labels(solver):
    train, test = features_of(300, 0, labels=(3, 17, 40)), features_of(100, 1, labels=(3, 17, 40))
    contiguous = probe(features_of(300, 0), features_of(100, 1), solver)
    result = probe(train, test, solver)
    assert torch.equal(result.ranks, contiguous.ranks)
    assert torch.equal(result.predicted, torch.tensor([3, 17, 40])[contiguous.predicted])
    assert result.classes.tolist() == [3, 17, 40]
    fewer = test.take(test.labels != 17)
    assert torch.equal(probe(train, fewer, solver).ranks, contiguous.ranks[test.labels != 17])
    strange = replace(test, labels=torch.where(test.labels == 17, 99, test.labels))
    assert (probe(train, strange, solver).ranks[test.labels == 17] == 1 << 31).all()


def with_constants(features):
    return replace(features, patch_mean=torch.full_like(features.patch_mean, 0.1))


def with_duplicates(features):
    return features.take(torch.arange(len(features.labels)).repeat_interleave(3))


CORNERS = {
    "two classes": (features_of(60, 0, labels=(5, 9)), features_of(60, 1, labels=(5, 9))),
    "constant features": (with_constants(features_of(60, 0)), with_constants(features_of(60, 1))),
    "duplicates": (with_duplicates(features_of(40, 0)), features_of(60, 1)),
    "fewer images than features": (features_of(15, 0), features_of(60, 1)),
}


@parametrize_solvers()
@pytest.mark.parametrize("corner", CORNERS)
def test_linear_probe_corner_cases(corner, solver):
    train, test = CORNERS[corner]
    result = probe(train, test, solver)
    assert (result.ranks == 0).float().mean() > 0.55
    assert result.probe.logits(result.chosen.variant.of(test)).isfinite().all()


@parametrize_solvers()
def test_linear_probe_learns_a_class_of_one_image(solver):
    train, test = features_of(100, 0), features_of(60, 1)
    single = (train.labels == 2).nonzero()[0]
    train = train.take(torch.cat([(train.labels < 2).nonzero().squeeze(1), single]))
    result = probe(train, test, solver)
    assert result.classes.tolist() == [0, 1, 2]
    scores = result.probe.logits(result.chosen.variant.of(test))[:, 2]
    assert scores[test.labels == 2].mean() > scores[test.labels < 2].mean()


@parametrize_solvers()
def test_linear_probe_rejects_overflowing_features(solver):
    train, test = features_of(60, 0), features_of(60, 1)
    half = [replace(part, cls=part.cls.half(), patch_mean=part.patch_mean.half()) for part in (train, test)]
    plain, found = probe(train, test, solver), probe(*half, solver)
    assert (found.ranks == plain.ranks).float().mean() > 0.9
    huge = replace(train, cls=(train.cls * 1e5).half())
    with pytest.raises(UserError, match="not finite"):
        probe(huge, test, solver)
    with pytest.raises(UserError, match="not finite"):
        probe(train, replace(test, cls=(test.cls * 1e5).half(), patch_mean=test.patch_mean * torch.inf), solver)


def test_standardizer_uses_mean_and_standard_deviation():
    x = features_of(50, 0).cls.flatten(1) * torch.logspace(-9, 9, 16)
    z = Standardizer.of(x).apply(x.double())
    assert torch.allclose(z.mean(dim=0), torch.zeros(16, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(z.std(dim=0, correction=0), torch.ones(16, dtype=torch.float64), atol=1e-12)
    assert (Standardizer.of(torch.full((9, 2), 0.1)).scale == 0).all()


def test_stratified_draws_a_fraction_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 30 + [2] * 2 + [3])
    mask = stratified(labels, 0.1, seed=0)
    assert [int(mask[labels == label].sum()) for label in range(4)] == [10, 3, 1, 0]
    assert torch.equal(mask, stratified(labels, 0.1, seed=0))
    assert not torch.equal(mask, stratified(labels, 0.1, seed=1))
    assert not stratified(labels, 0.99, seed=0)[labels == 2].all()


@parametrize_solvers(["logistic", "sgd"])
def test_linear_probe_without_val_images_names_ridge(solver):
    with pytest.raises(UserError, match="solver=ridge"):
        probe(one_of_each(), one_of_each(), solver)


def test_ridge_selects_with_one_image_per_class():
    result = probe(one_of_each(), features_of(90, 1), "ridge")
    assert (result.ranks == 0).float().mean() > 0.4
    assert result.chosen == min(result.candidates, key=lambda candidate: candidate.loss)


def one_of_each():
    train = features_of(60, 0)
    return train.take(torch.stack([(train.labels == label).nonzero()[0, 0] for label in range(3)]))


@parametrize_solvers(["logistic", "ridge"])
def test_linear_probe_warns_of_a_selection_at_the_end_of_the_grid(solver):
    train, test = features_of(300, 0), features_of(100, 1)

    def warnings(*l2):
        return probe(train, test, SOLVERS[solver]._replace(l2=l2)).warnings

    assert warnings(1e3, 1e-2, 1e-9) == []
    assert "largest" in warnings(1e-2, 1e-9)[0]
    assert "smallest" in warnings(1e3, 1e-2)[0]
    assert warnings(1e-2) == []


def test_sgd_skips_diverged_heads_and_warns():
    train, test = features_of(300, 0), features_of(100, 1)
    result = probe(train, test, SOLVERS["sgd"]._replace(lr=[1e-2, 1e39]))  # beyond float32
    assert result.chosen.settings["lr"] == 1e-2
    assert result.warnings[-1].startswith("8 of 16 heads diverged")
    plain = probe(train, test, SOLVERS["sgd"]._replace(lr=[1e-2]))
    torch.testing.assert_close(result.probe.weight, plain.probe.weight)
    assert all(candidate.accuracy == 0 for candidate in result.candidates if candidate.settings["lr"] == 1e39)
    with pytest.raises(UserError, match="all heads diverged"):
        probe(train, test, SOLVERS["sgd"]._replace(lr=[1e39]))
