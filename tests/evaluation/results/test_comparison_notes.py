"""Notes below the tables of `ssl-vit compare`, and metrics that have no paired test."""

import re

from ssl_vit.evaluation.results.comparison import compare
from ssl_vit.evaluation.results.eval_result import LAST_EPOCH, ON_TEST, Metric, ModelScores, Selection
from ssl_vit.evaluation.results.result_reader import find_results
from ssl_vit.evaluation.results.statistics import OVER_SUBSETS, mean_interval
from tests.helpers.results import COUNT, changed, compare_output, make_result, make_scores, write_result


def few_shot_result(name, values):
    """Make a mean over 3 subsets, with the predictions of the first."""
    suffix = ", 5 per class, ridge"
    low, high = mean_interval(values)
    metric = Metric(
        name=f"top-1{suffix}", value=sum(values) / 3, n=COUNT, low=low, high=high, interval=OVER_SUBSETS.format(3)
    )
    score = make_scores("model", values[0], 0, suffix).model_copy(update={"metrics": [metric]})
    return changed(make_result(name, task="fewshot"), score=score, baselines=[])


def linear_result(name, **fields):
    """Make a probe that was selected on the test images, and its last epoch."""
    best, last = make_scores("model", 0.7, len(name), ""), make_scores("model", 0.6, len(name) + 1, LAST_EPOCH)
    predictions = best.predictions | last.predictions
    score = ModelScores(name="model", metrics=best.metrics + last.metrics, predictions=predictions)
    selection = Selection(on=f"{ON_TEST}: the best of 100 epochs", chosen={"epoch": 7})
    return changed(make_result(name, task="linear-dino"), score=score, baselines=[], selection=selection, **fields)


def test_notes_name_every_kind_of_interval_with_its_columns(tmp_path, capsys):
    write_result(tmp_path / "knn.json", "dino")
    few_shot_result("dino", [0.4, 0.5, 0.6]).write(tmp_path / "fewshot.json")
    text = compare_output(capsys, tmp_path)
    kinds = ["95 %, Wilson (knn on photos)", "95 %, Wilson and Student's t over 3 subsets (fewshot on photos)"]
    assert f"± is half of the interval: {'; '.join(kinds)}\n" in text


def test_means_over_subsets_have_no_paired_test(tmp_path, capsys):
    for name, values in {"a": [0.4, 0.5, 0.6], "b": [0.5, 0.5, 0.5]}.items():
        few_shot_result(name, values).write(tmp_path / f"{name}.json")
    text = compare_output(capsys, tmp_path)
    assert "fewshot on photos: no paired tests of means over subsets" in text
    assert "p by Holm" not in text
    assert "paired tests" not in compare_output(capsys, tmp_path / "a.json")


def test_metrics_selected_on_the_test_images_are_marked_and_have_no_paired_test(tmp_path, capsys):
    for name in ("dino", "sitter"):
        linear_result(name).write(tmp_path / f"{name}.json")
    comparison = compare(find_results([tmp_path]).results, mix=False)
    assert [paired.column.metric for paired in comparison.paired] == ["top-1, last epoch"]
    text = compare_output(capsys, tmp_path)
    assert [re.split(r"  +", line)[0] for line in text.splitlines()[1:3]] == ["top-1 †", "top-1, last epoch"]
    assert "† selected on the test images: too high by design" in text
    assert "no paired test of top-1, which was selected on the test images" in text
    assert r"top-1 \textdagger{}" in compare_output(capsys, tmp_path, "format=latex")
    assert "<br>top-1 † |" in compare_output(capsys, tmp_path, "format=markdown")
    assert "†" not in compare_output(capsys, write_result(tmp_path / "knn.json", "dino"))


def test_warnings_of_results_appear_once(tmp_path, capsys):
    texts = {"a": ["chosen on the test images", "odd"], "b": ["chosen on the test images"], "c": []}
    for name, warnings in texts.items():
        linear_result(name, warnings=warnings * 2).write(tmp_path / f"{name}.json")
    lines = [line for line in compare_output(capsys, tmp_path).splitlines() if line.startswith("warning")]
    assert lines == [
        "warning, linear-dino on photos, a, b: chosen on the test images",
        "warning, linear-dino on photos, a: odd",
    ]


def test_comparison_notes_different_precisions(tmp_path, capsys):
    for name, dtype in {"a": "bfloat16", "b": "float32", "c": "bfloat16"}.items():
        changed(make_result(name), environment={"forward": dtype}).write(tmp_path / f"{name}.json")
    text = compare_output(capsys, tmp_path)
    assert "Paired" in text
    assert "knn on photos: the models were computed in bfloat16 (a, c) and float32 (b); rounding is part of" in text
    (tmp_path / "b.json").unlink()
    assert "rounding" not in compare_output(capsys, tmp_path)


def test_comparison_distinguishes_random_models_by_their_weights(tmp_path, capsys):
    for number, digest in enumerate("ef"):  # no file, and one name
        one = make_result("random-dino", seed=number)
        model = one.model.model_copy(update={"sha256": None, "state_sha256": digest * 64})
        changed(one, model=model).write(tmp_path / f"{digest}.json")
    text = compare_output(capsys, tmp_path)
    assert "random-dino (eeeeeeee)" in text
    assert "random-dino (ffffffff)" in text
    assert "the latest is shown" not in text


def test_comparison_shows_the_latest_of_two_results_in_any_order(tmp_path):
    write_result(tmp_path / "b.json", "dino", 0.2)
    write_result(tmp_path / "a.json", "dino", 0.9)  # within the same second, and first in the folder
    (row,) = (row for row in compare(find_results([tmp_path]).results, mix=False).rows if not row.baseline)
    backwards = find_results([tmp_path / "b.json", tmp_path / "a.json"]).results
    (same,) = (row for row in compare(backwards, mix=False).rows if not row.baseline)
    assert row == same
    assert next(iter(row.cells.values())).value > 0.8
