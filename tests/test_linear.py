"""The linear probe reaches the minimum, is chosen honestly, and takes any labels."""

import pytest
import torch
import torch.nn.functional as F
from reference import probes

from ssl_vit.errors import UserError
from ssl_vit.evaluation.features import Features
from ssl_vit.evaluation.linear import Logistic, linear_probe
from ssl_vit.evaluation.logistic import probe_path, standard_space
from ssl_vit.evaluation.probes import Variant, stratified

L2 = [1e-1, 1e-3, 1e-5]
VARIANTS = [Variant(1, False), Variant(1, True), Variant(2, False), Variant(2, True)]
CPU = torch.device("cpu")


def correlated(count, *, dim=6, classes=4, seed=0):
    """Features like a network's: one direction carries nearly all variance, means far from zero, classes overlap."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -2, dim)[:, None]
    labels = torch.randint(classes, (count,), generator=g)
    hidden = torch.randn(count, dim, generator=g)
    hidden[:, :classes] += 1.2 * F.one_hot(labels, classes)
    return hidden @ mixing + 3, labels


def features_of(count, seed, *, informative="both", labels=(0, 1, 2)):
    """Two blocks of 8 and a patch mean of 8; the classes show in the chosen part."""
    g = torch.Generator().manual_seed(seed)
    places = torch.randint(len(labels), (count,), generator=g)
    parts = torch.randn(3, count, 8, generator=g)  # earlier block, last block, patch mean
    shown = {"earlier": [0], "last": [1], "mean": [2], "both": [0, 1], "none": []}[informative]
    for part in shown:
        parts[part, :, : len(labels)] += 2 * F.one_hot(places, len(labels))
    return Features(parts[:2].transpose(0, 1).contiguous(), parts[2], torch.tensor(labels)[places], torch.arange(count))


def probe(train, test, *, variants=VARIANTS, l2=L2, seed=0):
    return linear_probe(train, test, variants=variants, solver=Logistic(l2, 0.1, seed), device=CPU)


@pytest.mark.parametrize(("count", "dim", "classes"), [(300, 6, 4), (60, 10, 2), (40, 12, 5), (20, 30, 3)])
def test_losses_along_the_path_equal_newtons(count, dim, classes):
    x, labels = correlated(count, dim=dim, classes=classes)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    for l2, found in probe_path(standard_space(x), labels, classes=classes, l2=[1e-5, 1e-1, 1e-3]):
        loss = F.cross_entropy(found.logits(x), labels) + l2 / 2 * found.weight.square().sum()
        assert float(loss) == pytest.approx(probes.logistic_loss(x, labels, classes, l2), abs=1e-4)
        torch.testing.assert_close(found.logits(x), standard @ found.weight + found.bias, rtol=1e-3, atol=1e-3)


def test_path_goes_from_strong_to_weak_penalties():
    x, labels = correlated(50)
    assert [l2 for l2, _ in probe_path(standard_space(x), labels, classes=4, l2=[1e-5, 1e-1, 1e-3])] == [
        1e-1,
        1e-3,
        1e-5,
    ]


def test_constant_features_have_no_say():
    x, labels = correlated(200)
    padded = torch.cat([x, torch.full((200, 2), 5.0)], dim=1)
    ((_, plain),) = probe_path(standard_space(x), labels, classes=4, l2=[1e-3])
    ((_, found),) = probe_path(standard_space(padded), labels, classes=4, l2=[1e-3])
    elsewhere = padded + torch.tensor([0.0] * x.shape[1] + [100.0, -100.0])
    torch.testing.assert_close(found.logits(elsewhere), plain.logits(x), rtol=1e-3, atol=1e-3)


def test_variants_are_the_last_blocks_and_the_patch_mean():
    features = Features(torch.arange(24.0).view(2, 3, 4), torch.arange(8.0).view(2, 4), torch.zeros(2), torch.zeros(2))
    assert torch.equal(Variant(1, False).of(features), features.cls[:, 2])
    assert torch.equal(Variant(2, False).of(features), features.cls[:, 1:].flatten(1))
    assert torch.equal(Variant(3, True).of(features), torch.cat([features.cls.flatten(1), features.patch_mean], 1))


@pytest.mark.parametrize(
    ("informative", "blocks", "patch_mean"), [("earlier", 2, None), ("mean", None, True), ("last", None, None)]
)
def test_the_features_that_tell_most_are_chosen(informative, blocks, patch_mean):
    result = probe(features_of(600, 0, informative=informative), features_of(300, 1, informative=informative))
    assert blocks in (None, result.chosen.variant.blocks)
    assert patch_mean in (None, result.chosen.variant.patch_mean)
    assert (result.ranks == 0).float().mean() > 0.8
    assert result.chosen == max(result.trials, key=lambda trial: (trial.accuracy, -trial.loss))
    assert len(result.trials) == len(VARIANTS) * len(L2)


@pytest.mark.parametrize("seed", range(3))
def test_choice_never_sees_the_test_pictures(seed):
    """Other test labels and features: the same trials, the same choice; only the score moves."""
    train, test = features_of(200, seed), features_of(100, seed + 10)
    result = probe(train, test, seed=seed)
    g = torch.Generator().manual_seed(seed)
    shuffled = Features(test.cls, test.patch_mean, test.labels[torch.randperm(100, generator=g)], test.index)
    noise = Features(torch.randn(test.cls.shape, generator=g), test.patch_mean, test.labels, test.index)
    for other in (shuffled, noise):
        again = probe(train, other, seed=seed)
        assert again.trials == result.trials
        assert again.chosen == result.chosen
        assert (again.ranks == 0).sum() < (result.ranks == 0).sum()


def test_labels_with_gaps_and_classes_of_one_side_only():
    train, test = features_of(300, 0, labels=(3, 17, 40)), features_of(100, 1, labels=(3, 17, 40))
    contiguous = probe(features_of(300, 0), features_of(100, 1))
    assert torch.equal(probe(train, test).ranks, contiguous.ranks)
    fewer = test.take(test.labels != 17)
    assert torch.equal(probe(train, fewer).ranks, contiguous.ranks[test.labels != 17])
    strange = Features(test.cls, test.patch_mean, torch.where(test.labels == 17, 99, test.labels), test.index)
    assert (probe(train, strange).ranks[test.labels == 17] == 3).all()


def test_held_out_pictures_are_a_share_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 30 + [2] * 2 + [3])
    held = stratified(labels, 0.1, seed=0)
    assert [int(held[labels == label].sum()) for label in range(4)] == [10, 3, 1, 0]
    assert torch.equal(held, stratified(labels, 0.1, seed=0))
    assert not torch.equal(held, stratified(labels, 0.1, seed=1))
    assert not stratified(labels, 0.99, seed=0)[labels == 2].all()


def test_classes_of_one_picture_leave_nothing_to_choose_on():
    single = features_of(3, 0).take(torch.arange(3))
    lone = Features(single.cls, single.patch_mean, torch.tensor([0, 1, 2]), single.index)
    with pytest.raises(UserError, match="two training pictures"):
        probe(lone, lone)


def test_choice_at_the_end_of_the_grid_is_warned_of():
    train, test = features_of(300, 0), features_of(100, 1)
    assert probe(train, test, l2=[1e3, 1e-2, 1e-9]).warnings == []
    assert "largest" in probe(train, test, l2=[1e-2, 1e-9]).warnings[0]
    assert "smallest" in probe(train, test, l2=[1e3, 1e-2]).warnings[0]
