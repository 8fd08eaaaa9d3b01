"""What `ssl-vit compare` says of its numbers, and which of them it does not test against each other."""

import re
from dataclasses import replace

from ssl_vit.evaluation.results.comparison import compare
from ssl_vit.evaluation.results.eval_result import LAST_EPOCH, ON_TEST, Metric, ModelScores
from ssl_vit.evaluation.results.result_reader import find_records
from ssl_vit.evaluation.results.statistics import OVER_SUBSETS, mean_interval
from tests.helpers.results import COUNT, record, scored, shown, written


def many_shots(name, values):
    """Few labels: means over 3 subsets, of which the answers are those of the first."""
    suffix = ", 5 per class, ridge"
    score = scored("model", values[0], 0, suffix)
    low, high = mean_interval(values)
    metric = Metric(f"top-1{suffix}", sum(values) / 3, COUNT, low, high, OVER_SUBSETS.format(3))
    return replace(record(name, task="fewshot"), score=replace(score, metrics=[metric]), baselines=[])


def probed(name, **changes):
    """A probe that was chosen by the test images, and beside it the last epoch."""
    looks = [scored("model", 0.7, len(name), ""), scored("model", 0.6, len(name) + 1, LAST_EPOCH)]
    metrics = [metric for look in looks for metric in look.metrics]
    answers = looks[0].answers | looks[1].answers
    selection = {"on": f"{ON_TEST}: the best of 100 looks", "chosen": {"epoch": 7}}
    one = replace(record(name, task="linear-dino"), score=ModelScores("model", metrics, {}, answers), baselines=[])
    return replace(one, selection=selection, **changes)


def test_every_kind_of_interval_is_named_with_its_columns(tmp_path, capsys):
    written(tmp_path / "knn.json", "dino")
    many_shots("dino", [0.4, 0.5, 0.6]).write(tmp_path / "fewshot.json")
    old = many_shots("dino", [0.4, 0.5, 0.6])
    metric = replace(old.score.metrics[0], interval="mean ± standard deviation over 3 subsets")
    replace(old, task="older", score=replace(old.score, metrics=[metric])).write(tmp_path / "older.json")
    text = shown(capsys, tmp_path)
    kinds = ["95 %, Student's t over 3 subsets (fewshot on photos)", "95 %, Wilson (knn on photos)"]
    kinds.append("mean ± standard deviation over 3 subsets (older on photos)")
    assert f"± is half of the interval: {'; '.join(kinds)}\n" in text


def test_means_over_subsets_are_not_tested_in_pairs(tmp_path, capsys):
    for name, values in {"a": [0.4, 0.5, 0.6], "b": [0.5, 0.5, 0.5]}.items():
        many_shots(name, values).write(tmp_path / f"{name}.json")
    text = shown(capsys, tmp_path)
    assert "fewshot on photos: paired tests are not made of means over subsets" in text
    assert "p by Holm" not in text
    assert "paired tests" not in shown(capsys, tmp_path / "a.json")


def test_what_was_chosen_by_the_test_images_is_marked_and_not_tested_in_pairs(tmp_path, capsys):
    for name in ("dino", "sitter"):
        probed(name).write(tmp_path / f"{name}.json")
    comparison = compare(find_records([tmp_path]).records, mix=False)
    assert [paired.column.metric for paired in comparison.paired] == ["top-1, last epoch"]
    text = shown(capsys, tmp_path)
    assert [re.split(r"  +", line)[0] for line in text.splitlines()[1:3]] == ["top-1 †", "top-1, last epoch"]
    assert "† chosen by the test images: too high by design" in text
    assert "no paired test of top-1, which was chosen by the test images" in text
    latex = shown(capsys, tmp_path, "format=latex")
    assert r"top-1 \textdagger{} & top-1, last epoch" in latex
    assert "<br>top-1 † |" in shown(capsys, tmp_path, "format=markdown")
    assert "†" not in shown(capsys, written(tmp_path / "knn.json", "dino"))


def test_warnings_of_the_records_stand_below_the_table_once(tmp_path, capsys):
    texts = {"a": ["chosen on the test images", "odd"], "b": ["chosen on the test images"], "c": []}
    for name, warnings in texts.items():
        probed(name, warnings=warnings * 2).write(tmp_path / f"{name}.json")
    lines = [line for line in shown(capsys, tmp_path).splitlines() if line.startswith("warning")]
    assert lines == [
        "warning, linear-dino on photos, a, b: chosen on the test images",
        "warning, linear-dino on photos, a: odd",
    ]


def test_models_that_computed_in_other_precisions_are_compared_and_it_is_said(tmp_path, capsys):
    for name, forward in {"a": "bfloat16", "b": "float32", "c": "bfloat16"}.items():
        replace(record(name), environment={"forward": forward}).write(tmp_path / f"{name}.json")
    text = shown(capsys, tmp_path)
    assert "Paired" in text
    assert "knn on photos: the models computed in bfloat16 (a, c) and float32 (b); rounding is part of" in text
    (tmp_path / "b.json").unlink()
    assert "rounding" not in shown(capsys, tmp_path)


def test_random_models_stay_apart_by_their_weights(tmp_path, capsys):
    """They have no file, and a name that says little."""
    for number, digest in enumerate("ef"):
        one = record("random-dino", seed=number)
        model = {**one.model, "sha256": None, "state_sha256": digest * 64}
        replace(one, model=model).write(tmp_path / f"{digest}.json")
    text = shown(capsys, tmp_path)
    assert "random-dino (eeeeeeee)" in text
    assert "random-dino (ffffffff)" in text
    assert "the latest counts" not in text


def test_of_two_records_the_later_counts_in_any_order(tmp_path):
    written(tmp_path / "b.json", "dino", 0.2)
    written(tmp_path / "a.json", "dino", 0.9)  # within the same second, and first in the folder
    (row,) = (row for row in compare(find_records([tmp_path]).records, mix=False).rows if not row.baseline)
    backwards = find_records([tmp_path / "b.json", tmp_path / "a.json"]).records
    (same,) = (row for row in compare(backwards, mix=False).rows if not row.baseline)
    assert row == same
    assert next(iter(row.cells.values())).value > 0.8
