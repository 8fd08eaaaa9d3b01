"""Few-shot accuracy: settings, subsets, scores, and the `fewshot` command."""

import json
import math
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
    few_shot_settings,
)
from ssl_vit.evaluation.classification.knn import UNRANKED
from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, label_ranks
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.evaluation.results.eval_result import Predictions, wilson
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.errors import UserError
from tests.reference import probes

L2 = [1e-3, 1e-1, 10.0]
CPU = torch.device("cpu")


def labels_of(*sizes):
    """Return shuffled labels with these class sizes."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def features_of(labels, *, seed, dim=6, apart=1.0):
    """Return features of one block and a patch mean, with overlapping classes."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(64, 2 * dim, generator=torch.Generator().manual_seed(9))
    x = torch.randn(len(labels), 2 * dim, generator=g) + apart * centers[labels] + 3
    return Features(x[:, None, :dim], x[:, dim:], labels, torch.arange(len(labels)))


def classified(train, test, settings, *, seeds=(0, 1), variant=FeatureVariant(1, True), l2=L2):  # noqa: B008
    return few_shot(train, test, variant=variant, settings=settings, seeds=seeds, l2=l2, device=CPU)


# --- settings ---


def test_few_shot_settings_are_sorted_by_size():
    found, warnings = few_shot_settings(labels_of(1000, 400), shots=[5, 1, 25], shares=[0.1, 0.01])
    assert [(setting.name, setting.counts.tolist()) for setting in found] == [
        ("1 per class", [1, 1]),
        ("5 per class", [5, 5]),
        ("1 %", [10, 4]),
        ("25 per class", [25, 25]),
        ("10 %", [100, 40]),
    ]
    assert warnings == []


def test_few_shot_settings_skip_shots_above_the_smallest_class():
    found, warnings = few_shot_settings(labels_of(30, 12, 50), shots=[1, 12, 13, 25], shares=[])
    assert [setting.name for setting in found] == ["1 per class", "12 per class"]
    assert warnings == ["13, 25 per class: skipped, the smallest class has 12 training images"]


def test_few_shot_settings_use_at_least_one_image_of_a_class():
    ((setting,), warnings) = few_shot_settings(labels_of(300, 4), shots=[], shares=[0.02])
    assert setting.counts.tolist() == [6, 1]
    assert warnings == ["2 %: less than one image of the smallest class (4); one is used"]


def test_few_shot_settings_merge_equal_counts():
    found, _ = few_shot_settings(labels_of(100, 100), shots=[1, 5, 5], shares=[0.01, 0.05, 0.01, 0.02])
    assert [setting.name for setting in found] == ["1 per class = 1 %", "2 %", "5 per class = 5 %"]


@pytest.mark.parametrize(("shots", "message"), [([10], "the smallest class has 3"), ([], "set shots or shares")])
def test_few_shot_settings_without_any_are_an_error(shots, message):
    with pytest.raises(UserError, match=message):
        few_shot_settings(labels_of(3, 20), shots=shots, shares=[])


# --- subsets ---


def test_draw_order_nests_subsets_within_classes():
    labels = labels_of(40, 3, 17)
    order = draw_order(labels, torch.arange(60), seed=0)
    for label, size in enumerate((40, 3, 17)):
        assert sorted(order[labels == label].tolist()) == list(range(size))


def test_draw_order_depends_on_images_not_their_order():
    labels, index = labels_of(40, 3, 17), torch.arange(60) * 2  # every second image could not be read
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        draw_order(labels[shuffled], index[shuffled], seed=5), draw_order(labels, index, seed=5)[shuffled]
    )
    assert torch.equal(draw_order(labels + 7, index, seed=5), draw_order(labels, index, seed=5))
    assert not torch.equal(draw_order(labels, index, seed=6), draw_order(labels, index, seed=5))


def test_draw_order_is_uniform():
    labels = labels_of(8, 5)
    first = sum((draw_order(labels, torch.arange(13), seed=seed) == 0).double() for seed in range(2000)) / 2000
    torch.testing.assert_close(first, 1.0 / torch.tensor([8.0, 5.0]).double()[labels], atol=0.04, rtol=0)


# --- scores ---


@pytest.mark.parametrize("sizes", [(30, 30, 30), (40, 9, 25)])
def test_few_shot_equals_the_textbook_form(sizes):
    train, test = features_of(labels_of(*sizes), seed=0), features_of(labels_of(30, 30, 30), seed=1)
    settings, _ = few_shot_settings(train.labels, shots=[1, 4], shares=[0.3])
    found = {(one.setting, one.classifier): one for one in classified(train, test, settings)}
    x, test_features = (FeatureVariant(1, True).of(part) for part in (train, test))
    for setting in settings:
        for index, seed in enumerate((0, 1)):
            rows = probes.subset(
                train.labels.tolist(), setting.counts.tolist(), draw_order(train.labels, train.index, seed=seed)
            )
            fitted = {l2: probes.ridge_by_refits(x[rows], train.labels[rows], test_features, 3, l2) for l2 in L2}
            best = min(fitted, key=lambda l2: fitted[l2][1])
            ridge, nearest = found[setting.name, RIDGE], found[setting.name, NEAREST]
            assert ridge.l2[index] == best
            right = (fitted[best][0].argmax(1) == test.labels).double().mean()
            assert ridge.accuracy[index] == pytest.approx(float(right))
            cls = train.cls[rows, 0].double().numpy(), test.cls[:, 0].double().numpy()
            predictions = probes.knn_classes(cls[1], cls[0], train.labels[rows].tolist(), 1, 0.07)
            hits = [voted[0] == target for voted, target in zip(predictions, test.labels.tolist(), strict=True)]
            assert nearest.accuracy[index] == pytest.approx(statistics.mean(hits))
            if seed == 0:
                assert torch.equal(ridge.predictions.predicted, fitted[best][0].argmax(1))
                assert nearest.predictions.predicted.tolist() == [voted[0] for voted in predictions]


def test_few_shot_does_not_select_on_test_images():
    train, test = features_of(labels_of(20, 20, 20), seed=0), features_of(labels_of(20, 20, 20), seed=1)
    settings, _ = few_shot_settings(train.labels, shots=[2, 10], shares=[])
    noise = Features(torch.randn_like(test.cls), torch.randn_like(test.patch_mean), test.labels, test.index)
    chosen = [[one.l2 for one in classified(train, each, settings)] for each in (test, noise)]
    assert chosen[0] == chosen[1]


def test_few_shot_improves_with_labels_and_is_reproducible():
    train, test = features_of(labels_of(200, 200, 200), seed=0), features_of(labels_of(200, 200, 200), seed=1)
    settings, _ = few_shot_settings(train.labels, shots=[1, 25], shares=[])
    outcomes = classified(train, test, settings, seeds=range(5))
    few, many = ([one.metric().value for one in outcomes if one.setting == setting.name] for setting in settings)
    assert all(more > less + 0.05 for less, more in zip(few, many, strict=True))
    again = classified(train, test, settings, seeds=range(5))
    assert [one.accuracy for one in again] == [one.accuracy for one in outcomes]


def test_few_shot_accepts_single_and_unseen_classes():
    labels = labels_of(12, 1, 9) * 5 + 3  # 3, 8, 13
    train, test = features_of(labels, seed=0, apart=4), features_of(labels_of(9, 9, 9, 9) * 5 + 3, seed=1, apart=4)
    settings, _ = few_shot_settings(train.labels, shots=[1, 5], shares=[0.5])
    assert [setting.counts.tolist() for setting in settings] == [[1, 1, 1], [6, 1, 4]]
    for one in classified(train, test, settings):
        assert set(one.predictions.predicted.tolist()) <= {3, 8, 13}
        assert (one.predictions.rank[test.labels == 18] > 0).all()  # of the class without training images
        assert 0.5 < one.accuracy[0] <= 0.75


def test_metric_is_the_mean_over_subsets_with_its_interval():
    predictions = Predictions(*[torch.arange(10)] * 3, torch.tensor([0] * 4 + [1] * 6))
    many = FewShotResult("5 per class", RIDGE, [0.5, 0.6, 0.7], predictions, [1.0, 1.0, 1.0]).metric()
    half = 4.3027 * statistics.stdev([0.5, 0.6, 0.7]) / 3**0.5  # Student's t of 2 degrees of freedom
    low, high = wilson(6, 10)  # the same test images in all subsets
    assert (many.name, many.n, many.value) == ("top-1, 5 per class, ridge", 10, pytest.approx(0.6))
    assert (many.low, many.high) == pytest.approx(
        (0.6 - math.hypot(half, 0.6 - low), 0.6 + math.hypot(half, high - 0.6)), abs=1e-4
    )
    assert many.interval == "Wilson and Student's t over 3 subsets"
    same = FewShotResult("5 per class", RIDGE, [0.2, 0.2, 0.2], predictions, [1.0, 1.0, 1.0]).metric()
    assert (same.low, same.high) == pytest.approx(wilson(2, 10))  # not 20.0 ± 0.0
    one = FewShotResult("5 per class", RIDGE, [0.4], predictions, [1.0]).metric()
    assert (one.low, one.high, one.interval) == (*wilson(4, 10), "Wilson")


def test_edge_warnings_list_settings_in_one_line():
    predictions = Predictions(*[torch.arange(10)] * 4)
    chosen = {"1 per class": [10.0, 10.0], "5 per class": [0.1, 1e-3], "10 %": [0.1, 0.1]}
    outcomes = [FewShotResult(name, RIDGE, [0.5, 0.5], predictions, l2) for name, l2 in chosen.items()]
    outcomes.append(FewShotResult("1 per class", NEAREST, [0.5, 0.5], predictions, []))
    (text,) = edge_warnings(outcomes, L2)
    assert "1 per class (the largest 2 of 2 times), 5 per class (the smallest 1 of 2 times); extend l2" in text
    assert edge_warnings(outcomes[2:], L2) == []
    assert edge_warnings(outcomes[:1], [10.0]) == []  # nothing was chosen


def test_few_shot_selects_the_largest_penalty_for_one_image_per_class():
    """Leave-one-out cannot predict the image's class, so the error is least for equal scores."""
    train, test = features_of(labels_of(20, 20, 20), seed=0), features_of(labels_of(9, 9, 9), seed=1)
    settings, _ = few_shot_settings(train.labels, shots=[1], shares=[])
    ridge, _ = classified(train, test, settings, seeds=range(20), l2=[1e-3, 1.0, 1e3, 1e4])
    assert set(ridge.l2) == {1e4}


def test_label_ranks_accept_labels_with_gaps():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert label_ranks(logits, torch.tensor([2, 5, 9]), torch.tensor([9, 5, 4])).tolist() == [1, 1, UNRANKED]


# --- the command ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 32, "depth": 2}
    backbone = Backbone(BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    export_backbone(backbone, path, mean=[0.5] * 3, std=[0.5] * 3, source="a test")
    return path


def run_fewshot(model, out, *overrides):
    assert main(["fewshot", "data.num_workers=0", f"checkpoint={model}", f"out={out}", *overrides]) == 0
    return json.loads(out.read_text())


def test_fewshot_writes_result_and_table(model, sample, tmp_path, capsys):
    result = run_fewshot(model, tmp_path / "a.json", f"data.root={sample}", "subsets=3")
    names = [metric["name"] for metric in result["score"]["metrics"]]
    assert names == [
        f"top-1, {setting}, {classifier}"
        for classifier in ("ridge", "1-NN")
        for setting in ("1 per class = 1 % = 2 % = 5 %", "10 %", "5 per class", "10 per class")
    ]
    assert [score["name"] for score in result["baselines"]] == ["random init", "raw pixels"]
    for score in [result["score"], *result["baselines"]]:
        details = score["details"]["subsets"]
        for metric, detail in zip(score["metrics"], details, strict=True):
            assert metric["n"] == 48
            assert metric["value"] == pytest.approx(statistics.mean(detail["accuracy"]))
            assert metric["interval"] == "Wilson and Student's t over 3 subsets"
            assert metric["low"] <= metric["value"] <= metric["high"]
            assert detail["standard_deviation"] == pytest.approx(statistics.stdev(detail["accuracy"]))
            assert 0 <= metric["value"] <= 0.7  # nothing was trained
            assert len(detail.get("l2", [0] * 3)) == 3
    assert result["data"]["labeled"] == {
        "1 per class = 1 % = 2 % = 5 %": 12,
        "10 %": 24,
        "5 per class": 60,
        "10 per class": 120,
    }
    assert any(text.startswith("25 per class: skipped") for text in result["warnings"])
    assert result["seeds"]["subsets"] == [0, 1, 2]
    ridge = [one for one in result["score"]["details"]["subsets"] if one["classifier"] == RIDGE]
    assert result["selection"] == {
        "on": "leave-one-out within each subset",
        "chosen": {one["setting"]: {"l2": one["l2"]} for one in ridge},
    }
    assert sum("an end of the candidates" in text for text in result["warnings"]) == 1
    printed = capsys.readouterr().out
    assert "25 per class: skipped" in printed
    assert "raw pixels" in printed


def test_fewshot_subsets_depend_on_the_seed(model, sample, tmp_path):
    overrides = [f"data.root={sample}", "baselines=false", "shots=[2]", "shares=[]", "subsets=2"]
    first, again, other = (
        run_fewshot(model, tmp_path / f"{name}.json", *overrides, f"seed={seed}")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["score"] == again["score"]
    assert first["protocol_hash"] == again["protocol_hash"] != other["protocol_hash"]
    accuracies = [result["score"]["details"]["subsets"][0]["accuracy"] for result in (first, other)]
    assert accuracies[0][1] == accuracies[1][0]  # subset 1 is subset 1, whichever came first


def test_fewshot_splits_a_single_folder(model, sample, tmp_path):
    overrides = [f"data.root={sample / 'train'}", "baselines=false", "shots=[1]", "shares=[]", "subsets=1"]
    result = run_fewshot(model, tmp_path / "a.json", *overrides)
    assert result["protocol"]["split"] == "0.2 of each class held out as test images, seed 0"
    assert (result["data"]["n_train"], result["data"]["n_test"]) == (156, 36)
    assert {metric["interval"] for metric in result["score"]["metrics"]} == {"Wilson"}


def test_fewshot_of_a_random_model_is_in_the_expected_range(cifar, tmp_path):
    """A random model, 5 of 60 images per class: above chance (0.1), far below what training reaches."""
    overrides = [f"data.root={cifar}", "baselines=false", "shots=[5]", "shares=[]"]
    result = run_fewshot("random:vit_tiny_patch16_224", tmp_path / "a.json", *overrides, "data.image_size=32")
    for metric in result["score"]["metrics"]:
        assert 0.11 < metric["value"] < 0.35
