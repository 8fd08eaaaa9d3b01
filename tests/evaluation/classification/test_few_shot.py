"""Accuracy from few labels: which images, chosen how, and that a record says so."""

import json
import statistics

import pytest
import torch

from ssl_vit.cli import main
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.evaluation.classification.few_shot import (
    NEAREST,
    RIDGE,
    FewShotResult,
    draw_order,
    edge_warnings,
    few_shot,
    settings,
)
from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, label_ranks
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.evaluation.results.eval_result import Predictions, wilson
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import export_backbone
from ssl_vit.runtime.errors import UserError
from tests.reference import probes

L2 = [1e-3, 1e-1, 10.0]
CPU = torch.device("cpu")


def labels_of(*sizes):
    """So many images of classes 0, 1, ..., mixed."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def features_of(labels, *, seed, dim=6, apart=1.0):
    """One block and a patch mean, in which classes overlap."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(64, 2 * dim, generator=torch.Generator().manual_seed(9))
    x = torch.randn(len(labels), 2 * dim, generator=g) + apart * centers[labels] + 3
    return Features(x[:, None, :dim], x[:, dim:], labels, torch.arange(len(labels)))


def classified(train, test, among, *, seeds=(0, 1), variant=FeatureVariant(1, True), l2=L2):  # noqa: B008
    return few_shot(train, test, variant=variant, among=among, seeds=seeds, l2=l2, device=CPU)


# --- settings ---


def test_settings_are_shots_and_shares_by_size():
    found, warnings = settings(labels_of(1000, 400), shots=[5, 1, 25], shares=[0.1, 0.01])
    assert [(setting.name, setting.counts.tolist()) for setting in found] == [
        ("1 per class", [1, 1]),
        ("5 per class", [5, 5]),
        ("1 %", [10, 4]),
        ("25 per class", [25, 25]),
        ("10 %", [100, 40]),
    ]
    assert warnings == []


def test_shots_beyond_the_smallest_class_are_left_out_and_said():
    found, warnings = settings(labels_of(30, 12, 50), shots=[1, 12, 13, 25], shares=[])
    assert [setting.name for setting in found] == ["1 per class", "12 per class"]
    assert warnings == ["13, 25 per class: left out, the smallest class has 12 training images"]


def test_a_share_takes_at_least_one_image_and_says_so():
    ((setting,), warnings) = settings(labels_of(300, 4), shots=[], shares=[0.02])
    assert setting.counts.tolist() == [6, 1]
    assert warnings == ["2 %: less than one image of the smallest class (4); one is taken"]


def test_settings_of_the_same_counts_are_one():
    found, _ = settings(labels_of(100, 100), shots=[1, 5, 5], shares=[0.01, 0.05, 0.01, 0.02])
    assert [setting.name for setting in found] == ["1 per class = 1 %", "2 %", "5 per class = 5 %"]


@pytest.mark.parametrize(("shots", "told"), [([10], "the smallest class has 3"), ([], "name some shots or shares")])
def test_settings_of_which_nothing_is_left_are_refused(shots, told):
    with pytest.raises(UserError, match=told):
        settings(labels_of(3, 20), shots=shots, shares=[])


# --- subsets ---


def test_subsets_hold_so_many_of_each_class_and_the_smaller_lie_within_the_larger():
    labels = labels_of(40, 3, 17)
    turn = draw_order(labels, torch.arange(60), seed=0)
    for label, size in enumerate((40, 3, 17)):
        assert sorted(turn[labels == label].tolist()) == list(range(size))


def test_subsets_depend_on_the_images_and_not_on_their_order():
    labels, index = labels_of(40, 3, 17), torch.arange(60) * 2  # every second image could not be read
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        draw_order(labels[shuffled], index[shuffled], seed=5), draw_order(labels, index, seed=5)[shuffled]
    )
    assert torch.equal(draw_order(labels + 7, index, seed=5), draw_order(labels, index, seed=5))
    assert not torch.equal(draw_order(labels, index, seed=6), draw_order(labels, index, seed=5))


def test_every_image_is_as_likely_as_the_others():
    labels = labels_of(8, 5)
    first = sum((draw_order(labels, torch.arange(13), seed=seed) == 0).double() for seed in range(2000)) / 2000
    torch.testing.assert_close(first, 1.0 / torch.tensor([8.0, 5.0]).double()[labels], atol=0.04, rtol=0)


# --- scores ---


@pytest.mark.parametrize("sizes", [(30, 30, 30), (40, 9, 25)])
def test_scores_equal_those_of_loops_and_scikit_learn(sizes):
    train, test = features_of(labels_of(*sizes), seed=0), features_of(labels_of(30, 30, 30), seed=1)
    among, _ = settings(train.labels, shots=[1, 4], shares=[0.3])
    found = {(one.setting, one.classifier): one for one in classified(train, test, among)}
    x, asked = (FeatureVariant(1, True).of(part) for part in (train, test))
    for setting in among:
        for place, seed in enumerate((0, 1)):
            rows = probes.subset(
                train.labels.tolist(), setting.counts.tolist(), draw_order(train.labels, train.index, seed=seed)
            )
            fitted = {l2: probes.ridge_by_refits(x[rows], train.labels[rows], asked, 3, l2) for l2 in L2}
            best = min(fitted, key=lambda l2: fitted[l2][1])
            ridge, nearest = found[setting.name, RIDGE], found[setting.name, NEAREST]
            assert ridge.l2[place] == best
            right = (fitted[best][0].argmax(1) == test.labels).double().mean()
            assert ridge.accuracy[place] == pytest.approx(float(right))
            cls = train.cls[rows, 0].double().numpy(), test.cls[:, 0].double().numpy()
            answers = probes.knn_classes(cls[1], cls[0], train.labels[rows].tolist(), 1, 0.07)
            hits = [answer[0] == truth for answer, truth in zip(answers, test.labels.tolist(), strict=True)]
            assert nearest.accuracy[place] == pytest.approx(statistics.mean(hits))
            if seed == 0:
                assert torch.equal(ridge.answers.predicted, fitted[best][0].argmax(1))
                assert nearest.answers.predicted.tolist() == [answer[0] for answer in answers]


def test_choice_never_sees_the_test_images():
    train, test = features_of(labels_of(20, 20, 20), seed=0), features_of(labels_of(20, 20, 20), seed=1)
    among, _ = settings(train.labels, shots=[2, 10], shares=[])
    noise = Features(torch.randn_like(test.cls), torch.randn_like(test.patch_mean), test.labels, test.index)
    chosen = [[one.l2 for one in classified(train, asked, among)] for asked in (test, noise)]
    assert chosen[0] == chosen[1]


def test_more_labels_help_and_the_same_seeds_give_the_same():
    train, test = features_of(labels_of(200, 200, 200), seed=0), features_of(labels_of(200, 200, 200), seed=1)
    among, _ = settings(train.labels, shots=[1, 25], shares=[])
    outcomes = classified(train, test, among, seeds=range(5))
    few, many = ([one.metric().value for one in outcomes if one.setting == setting.name] for setting in among)
    assert all(more > less + 0.05 for less, more in zip(few, many, strict=True))
    again = classified(train, test, among, seeds=range(5))
    assert [one.accuracy for one in again] == [one.accuracy for one in outcomes]


def test_classes_of_one_image_and_of_one_side_only():
    labels = labels_of(12, 1, 9) * 5 + 3  # 3, 8, 13
    train, test = features_of(labels, seed=0, apart=4), features_of(labels_of(9, 9, 9, 9) * 5 + 3, seed=1, apart=4)
    among, _ = settings(train.labels, shots=[1, 5], shares=[0.5])
    assert [setting.counts.tolist() for setting in among] == [[1, 1, 1], [6, 1, 4]]
    for one in classified(train, test, among):
        assert set(one.answers.predicted.tolist()) <= {3, 8, 13}
        assert (one.answers.rank[test.labels == 18] > 0).all()  # of the class without training images
        assert 0.5 < one.accuracy[0] <= 0.75


def test_metric_is_the_mean_over_subsets_with_an_interval_of_other_subsets():
    answers = Predictions(*[torch.arange(10)] * 3, torch.tensor([0] * 4 + [1] * 6))
    many = FewShotResult("5 per class", RIDGE, [0.5, 0.6, 0.7], answers, [1.0, 1.0, 1.0]).metric()
    half = 4.3027 * statistics.stdev([0.5, 0.6, 0.7]) / 3**0.5  # Student's t of 2 degrees of freedom
    assert (many.name, many.n, many.value) == ("top-1, 5 per class, ridge", 10, pytest.approx(0.6))
    assert (many.low, many.high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-4)
    assert many.interval == "Student's t over 3 subsets"
    one = FewShotResult("5 per class", RIDGE, [0.4], answers, [1.0]).metric()
    assert (one.low, one.high, one.interval) == (*wilson(4, 10), "Wilson")


def test_an_end_of_the_penalties_that_was_chosen_is_told_in_one_line():
    answers = Predictions(*[torch.arange(10)] * 4)
    chosen = {"1 per class": [10.0, 10.0], "5 per class": [0.1, 1e-3], "10 %": [0.1, 0.1]}
    outcomes = [FewShotResult(name, RIDGE, [0.5, 0.5], answers, l2) for name, l2 in chosen.items()]
    outcomes.append(FewShotResult("1 per class", NEAREST, [0.5, 0.5], answers, []))
    (text,) = edge_warnings(outcomes, L2)
    assert "1 per class (the largest 2 of 2 times), 5 per class (the smallest 1 of 2 times); widen l2" in text
    assert edge_warnings(outcomes[2:], L2) == []
    assert edge_warnings(outcomes[:1], [10.0]) == []  # nothing was chosen


def test_of_one_image_per_class_the_largest_penalty_is_chosen_whatever_it_is():
    """The scores of a left-out image are spread over the other classes, and least where all get the same."""
    train, test = features_of(labels_of(20, 20, 20), seed=0), features_of(labels_of(9, 9, 9), seed=1)
    among, _ = settings(train.labels, shots=[1], shares=[])
    ridge, _ = classified(train, test, among, seeds=range(20), l2=[1e-3, 1.0, 1e3, 1e4])
    assert set(ridge.l2) == {1e4}


def test_ranks_of_labels_with_gaps():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert label_ranks(logits, torch.tensor([2, 5, 9]), torch.tensor([9, 5, 4])).tolist() == [1, 1, 3]


# --- the command ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 32, "depth": 2}
    backbone = Backbone(BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    export_backbone(backbone, path, mean=[0.5] * 3, std=[0.5] * 3, source="a test")
    return path


def record_of(model, out, *words):
    assert main(["fewshot", "data.num_workers=0", f"checkpoint={model}", f"out={out}", *words]) == 0
    return json.loads(out.read_text())


def test_record_and_table(model, sample, tmp_path, capsys):
    record = record_of(model, tmp_path / "a.json", f"data.root={sample}", "subsets=3")
    names = [metric["name"] for metric in record["score"]["metrics"]]
    assert names == [
        f"top-1, {setting}, {classifier}"
        for classifier in ("ridge", "1-NN")
        for setting in ("1 per class = 1 % = 2 % = 5 %", "10 %", "5 per class", "10 per class")
    ]
    assert [score["name"] for score in record["baselines"]] == ["random init", "raw pixels"]
    for score in [record["score"], *record["baselines"]]:
        details = score["details"]["subsets"]
        for metric, detail in zip(score["metrics"], details, strict=True):
            assert metric["n"] == 48
            assert metric["value"] == pytest.approx(statistics.mean(detail["accuracy"]))
            assert metric["interval"] == "Student's t over 3 subsets"
            assert metric["low"] <= metric["value"] <= metric["high"]
            assert detail["standard_deviation"] == pytest.approx(statistics.stdev(detail["accuracy"]))
            assert 0 <= metric["value"] <= 0.7  # nothing was trained
            assert len(detail.get("l2", [0] * 3)) == 3
    assert record["data"]["labeled"] == {
        "1 per class = 1 % = 2 % = 5 %": 12,
        "10 %": 24,
        "5 per class": 60,
        "10 per class": 120,
    }
    assert any(text.startswith("25 per class: left out") for text in record["warnings"])
    assert record["seeds"]["subsets"] == [0, 1, 2]
    ridge = [one for one in record["score"]["details"]["subsets"] if one["classifier"] == RIDGE]
    assert record["selection"] == {
        "on": "leave-one-out within each subset",
        "chosen": {one["setting"]: {"l2": one["l2"]} for one in ridge},
    }
    assert sum("an end of what was offered" in text for text in record["warnings"]) == 1
    printed = capsys.readouterr().out
    assert "25 per class: left out" in printed
    assert "raw pixels" in printed


def test_the_same_seed_gives_the_same_record_and_another_seed_other_subsets(model, sample, tmp_path):
    words = [f"data.root={sample}", "baselines=false", "shots=[2]", "shares=[]", "subsets=2"]
    first, again, other = (
        record_of(model, tmp_path / f"{name}.json", *words, f"seed={seed}")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["score"] == again["score"]
    assert first["protocol_hash"] == again["protocol_hash"] != other["protocol_hash"]
    accuracies = [record["score"]["details"]["subsets"][0]["accuracy"] for record in (first, other)]
    assert accuracies[0][1] == accuracies[1][0]  # subset 1 is subset 1, whichever came first


def test_one_folder_is_split(model, sample, tmp_path):
    words = [f"data.root={sample / 'train'}", "baselines=false", "shots=[1]", "shares=[]", "subsets=1"]
    record = record_of(model, tmp_path / "a.json", *words)
    assert record["protocol"]["split"] == "0.2 of each class held out to test, seed 0"
    assert (record["data"]["n_train"], record["data"]["n_test"]) == (156, 36)
    assert {metric["interval"] for metric in record["score"]["metrics"]} == {"Wilson"}


def test_real_images_with_few_labels_lie_in_a_known_band(cifar, tmp_path):
    """A random model, 5 of 60 images per class: above chance (0.1), far below what training reaches."""
    words = [f"data.root={cifar}", "baselines=false", "shots=[5]", "shares=[]"]
    record = record_of("random:vit_tiny_patch16_224", tmp_path / "a.json", *words, "data.image_size=32")
    for metric in record["score"]["metrics"]:
        assert 0.11 < metric["value"] < 0.35
