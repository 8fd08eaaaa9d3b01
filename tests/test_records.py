"""Records say all of a result, in numbers that hold."""

import json
from dataclasses import replace

import pytest
import torch

from ssl_vit.evaluation.records import Metric, Record, Score, accuracies, protocol_hash, wilson

METRIC = Metric("top-1, k=20", 0.5, 100, 0.404, 0.596)
RECORD = Record(
    task="knn",
    protocol={"k": [20], "split": "train and test"},
    model={"source": "runs/x"},
    data={"name": "photos", "n_train": 1000, "n_test": 100, "n_classes": 4},
    seed=0,
    score=Score("network", [METRIC], {"k_effective": {20: 20}}),
    baselines=[Score("raw pixels", [replace(METRIC, value=0.25)], {})],
    seconds=1.5,
    environment={"device": "cpu"},
    warnings=["look out"],
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # Newcombe 1998, table I: score method
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_interval_equals_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_interval_holds_the_truth_in_95_of_100_repetitions(share):
    right = torch.distributions.Binomial(100, torch.tensor(share)).sample((4000,))
    bounds = torch.tensor([wilson(int(count), 100) for count in right])
    assert ((bounds[:, 0] <= share) & (share <= bounds[:, 1])).float().mean() > 0.92


def test_accuracies_count_ranks():
    ranks = torch.tensor([0, 0, 1, 4, 5, 9])
    top1, top5 = accuracies(ranks, 10, ", k=3")
    assert (top1.name, top1.value, top1.n) == ("top-1, k=3", pytest.approx(2 / 6), 6)
    assert (top5.name, top5.value) == ("top-5, k=3", pytest.approx(4 / 6))
    assert (top1.low, top1.high) == wilson(2, 6)


@pytest.mark.parametrize(("classes", "metrics"), [(2, 1), (5, 1), (6, 2)])
def test_top_5_needs_six_classes(classes, metrics):
    assert len(accuracies(torch.tensor([0, 1]), classes)) == metrics


def test_protocols_are_equal_in_any_order_and_differ_in_any_value():
    protocol = {"k": [10, 20], "temperature": 0.07, "transform": {"image_size": 32}}
    same = {"transform": {"image_size": 32}, "temperature": 0.07, "k": [10, 20]}
    assert protocol_hash("knn", protocol) == protocol_hash("knn", same)
    others = [protocol_hash("linear", protocol)]
    others += [protocol_hash("knn", {**protocol, **change}) for change in ({"k": [20]}, {"temperature": 0.1}, {"x": 1})]
    assert len({protocol_hash("knn", protocol), *others}) == 5


def test_written_record_can_be_read_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "eval" / "knn-photos.json"
    RECORD.write(path)
    RECORD.write(path)
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert content["tool"]["name"] == "ssl-vit"
    assert content["protocol_hash"] == protocol_hash("knn", RECORD.protocol)
    assert content["score"]["metrics"][0] == {
        "name": "top-1, k=20",
        "value": 0.5,
        "n": 100,
        "low": 0.404,
        "high": 0.596,
        "interval": "Wilson",
    }
    assert [file.name for file in path.parent.iterdir()] == ["knn-photos.json"]


def test_table_shows_the_scores_side_by_side():
    lines = RECORD.table().splitlines()
    assert lines[0] == "knn on photos: 100 test pictures, 4 classes, 1,000 training pictures (train and test)"
    assert lines[2].split() == ["accuracy", "in", "%", "network", "raw", "pixels"]
    assert lines[3].split() == ["top-1,", "k=20", "50.0", "±", "9.6", "25.0"]
    assert lines[-1] == "warning: look out"
