"""`ssl-vit compare`: tables of several models, paired tests, and no column of mixed protocols or images."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_vit.cli import main
from ssl_vit.evaluation.results.comparison import compare
from ssl_vit.evaluation.results.comparison_tables import render
from ssl_vit.evaluation.results.eval_result import DataInfo, Metric, ModelScores, Predictions
from ssl_vit.evaluation.results.result_reader import find_results, read_predictions, read_result
from ssl_vit.evaluation.results.statistics import paired_difference
from ssl_vit.runtime.errors import UserError
from tests.helpers.results import (
    COUNT,
    changed,
    compare_error,
    compare_output,
    make_result,
    random_correct,
    write_result,
)

OLD = {"schema": 2, "task": "knn", "tool": {"name": "ssl-vit", "version": "0.1.0"}}


@pytest.fixture
def runs(tmp_path):
    """Two run folders with kNN and a linear probe each."""
    for number, (name, share) in enumerate({"dino": 0.6, "sit_longer": 0.75}.items()):
        folder = tmp_path / "runs" / name / "eval"
        write_result(folder / "knn-photos.json", name, share, seed=number)
        write_result(folder / "linear-photos.json", name, share + 0.1, seed=number, task="linear")
    return tmp_path / "runs"


def test_text_has_a_block_per_evaluation_with_models_as_columns(runs, capsys):
    lines = compare_output(capsys, runs / "dino", runs / "sit_longer").splitlines()
    knn, measured, _, linear = lines[:4]
    # Baselines that are equal for both models are shown once, others for each model.
    names = ["dino", "sit_longer", "random init of dino", "random init of sit_longer", "raw pixels"]
    assert re.split(r"  +", knn) == ["knn on photos, in %", *names]
    share = float(random_correct(0.6, 0).float().mean())
    metric, of_dino, *_ = re.split(r"  +", measured)
    assert metric == "top-1, k=20"
    assert of_dino.startswith(f"{100 * share:.1f} ± ")
    assert linear.startswith("linear on photos, in %")


def test_comparison_in_markdown_has_models_as_rows_and_metrics_as_columns(runs, capsys):
    head, _, *rows = compare_output(capsys, runs / "dino", runs / "sit_longer", "format=markdown").splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "in %",
        "knn on photos<br>top-1, k=20",
        "linear on photos<br>top-1",
    ]
    assert [row.split()[1] for row in rows[:5]] == ["dino", "sit\\_longer", "random", "random", "raw"]


def test_comparison_tests_each_model_against_the_first(runs, capsys):
    text = compare_output(capsys, runs / "dino", runs / "sit_longer")
    found = paired_difference(random_correct(0.6, 0), random_correct(0.75, 1))
    row = next(line for line in text.splitlines() if line.startswith("knn on photos, top-1, k=20"))
    assert "sit_longer - dino" in row
    points = f"{100 * found.value:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
    assert points in row
    assert row.split()[-4:-2] == [str(found.gained), str(found.lost)]
    assert "corrected for these 2 comparisons" in text  # by Holm's method
    comparison = compare(find_results([runs / "dino", runs / "sit_longer"]).results, mix=False)
    smaller, larger = sorted(comparison.paired, key=lambda one: one.difference.p)
    assert smaller.adjusted == pytest.approx(min(1, 2 * smaller.difference.p))
    assert larger.adjusted == pytest.approx(max(smaller.adjusted, larger.difference.p))


def test_comparison_in_markdown_has_the_best_in_bold(runs, capsys, tmp_path):
    out = tmp_path / "a" / "table.md"
    text = compare_output(capsys, runs / "dino", runs / "sit_longer", "format=markdown", f"out={out}")
    table = text.split("\n\n")[0].splitlines()
    assert {line.count("|") for line in table} == {4}
    assert table[2].count("**") == 0
    assert table[3].split()[:2] == ["|", "sit\\_longer"]
    assert table[3].count("**") == 4
    assert out.read_text().startswith("\n".join(table))


def test_comparison_in_latex_is_well_formed(runs, capsys):
    text = compare_output(capsys, runs / "dino", runs / "sit_longer", "format=latex")
    first = text[: text.index(r"\end{tabular}")]
    rows = [line for line in first.splitlines() if line.endswith(r" \\")]
    assert [row.count("&") for row in rows] == [2, 2, 2, 2, 2, 2, 2]
    assert rows[0].count(r"\multicolumn{1}{c}") == 2
    assert re.search(r"sit\\_longer +& \\textbf{", first)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    plain = re.sub(r"\\[a-z]+|\\[&%$#_{}\\]", "", "\n".join(line.partition("% ")[0] for line in text.splitlines()))
    assert plain.count("{") == plain.count("}")
    assert not set("_#%") & set(plain)


def test_comparison_of_one_result_is_a_table(runs, capsys):
    text = compare_output(capsys, runs / "dino" / "eval" / "knn-photos.json", "format=markdown")
    assert "| raw pixels" in text
    assert "**" not in text
    assert "Paired" not in text


def test_comparison_does_not_mix_protocols_and_images(tmp_path, capsys):
    a = write_result(tmp_path / "a.json", "a", k=[20])
    b = write_result(tmp_path / "b.json", "b", k=[10], temperature=0.1)
    error = compare_error(capsys, a, b)
    assert "knn on photos" in error
    assert "protocol.temperature: 0.07 | 0.1" in error
    assert "protocol.k: [20] | [10]" in error
    assert "image_size" not in error
    assert "mix=true" in error
    text = compare_output(capsys, a, b, "mix=true")
    assert [line[:17] for line in text.splitlines() if line.startswith("knn on photos [")] == [
        "knn on photos [1]",
        "knn on photos [2]",
    ]
    assert "protocol.temperature: 0.07 | 0.1" in text
    assert "Paired" not in text
    c = tmp_path / "c.json"
    other = make_result("c", k=[20])
    changed(other, data=DataInfo(**{**other.data.model_dump(), "fingerprints": ["a", "c"]})).write(c)
    assert 'data.fingerprints: ["a", "b"] | ["a", "c"]' in compare_error(capsys, a, c)


def test_comparison_has_columns_for_other_tasks_and_datasets(tmp_path, capsys):
    a = write_result(tmp_path / "a.json", "a")
    b = write_result(tmp_path / "b.json", "b", data="other")
    photos, first, _, other, second, *_ = compare_output(capsys, a, b).splitlines()
    assert photos.startswith("knn on photos, in %")
    assert other.startswith("knn on other, in %")
    assert first.split()[2] != "–"
    assert second.split()[2] == "–"  # a was not evaluated on the other


def test_comparison_notes_missing_predictions(runs, capsys):
    (runs / "dino" / "eval" / "knn-photos.npz").unlink()
    text = compare_output(capsys, runs / "dino", runs / "sit_longer")
    assert "no paired test of sit_longer and dino for knn on photos" in text
    assert "knn-photos.json lacks its predictions (knn-photos.npz)" in text
    assert "corrected for this 1 comparison" in text  # of the linear probe


def test_read_predictions_rejects_those_of_another_evaluation(tmp_path):
    path = write_result(tmp_path / "a.json", "a")
    old = path.read_text()
    assert read_predictions(read_result(path), ", k=20") is not None
    assert read_predictions(read_result(path), ", k=3") is None
    write_result(path, "a", 0.9)
    path.write_text(old)
    assert read_predictions(read_result(path), ", k=20") is None


def test_paired_tests_match_images_by_their_index(tmp_path):
    """An image that one evaluation could not read is excluded for both."""
    both = [make_result("a", 0.5, seed=1), make_result("b", 0.5, seed=2)]
    predictions = both[1].score.predictions[", k=20"]
    kept = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:-7]
    fewer = Predictions(*(part[kept] for part in predictions))
    both[1] = changed(both[1], score=both[1].score.model_copy(update={"predictions": {", k=20": fewer}}))
    for name, one in zip("ab", both, strict=True):
        one.write(tmp_path / f"{name}.json")
    (paired,) = compare(find_results([tmp_path]).results, mix=False).paired
    assert paired.difference == paired_difference(random_correct(0.5, 1)[kept], random_correct(0.5, 2)[kept])


def test_models_of_one_name_are_distinguished_by_their_weights(tmp_path, capsys):
    a, b = write_result(tmp_path / "a.json", "a"), tmp_path / "b.json"
    other = make_result("a", 0.7, seed=3)
    changed(other, model=other.model.model_copy(update={"sha256": "f" * 64})).write(b)
    text = compare_output(capsys, a, b, a)
    assert "a (00000000)" in text
    assert "a (ffffffff)" in text
    again = write_result(tmp_path / "c.json", "a", 0.8)
    assert "several results of a for knn on photos" in compare_output(capsys, a, again)


def test_find_results_explains_what_is_no_result(tmp_path, capsys, runs):
    def file(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    assert "no such file" in compare_error(capsys, tmp_path / "nowhere.json")
    assert "name too long" in compare_error(capsys, "x" * 5000)
    assert "not a JSON file" in compare_error(capsys, file("a.json", "{"))
    assert "not a JSON file" in compare_error(capsys, file("b.json", b"\xff\x00"))
    assert "not a JSON file" in compare_error(capsys, file("c.json", "[" * 100_000))
    assert "not a result" in compare_error(capsys, file("d.json", "[1]"))
    assert "not a result" in compare_error(capsys, file("e.json", '{"schema": 3}'))
    assert "f.json: written by ssl-vit 0.1.0 in format 2" in compare_error(capsys, file("f.json", json.dumps(OLD)))
    assert "another version of ssl-vit" in compare_error(
        capsys, file("f.json", '{"schema": [1], "task": "", "tool": 3}')
    )
    assert "check baselines, data, model" in compare_error(capsys, file("g.json", '{"schema": 3, "task": "knn"}'))
    whole = json.loads((runs / "dino" / "eval" / "knn-photos.json").read_text())
    deep = json.dumps({**whole, "protocol": "deep"}).replace('"deep"', '{"a":' * 5000 + "1" + "}" * 5000)
    assert re.search("nested too deeply|not a JSON", compare_error(capsys, file("h.json", deep)))
    (tmp_path / "empty" / "eval").mkdir(parents=True)
    assert "contains no result" in compare_error(capsys, tmp_path / "empty")
    assert "name results or run directories" in compare_error(capsys)
    assert "format" in compare_error(capsys, runs, "format=html")
    assert "foo: unknown key" in compare_error(capsys, runs, "foo=1")


def test_find_results_ignores_files_of_other_kinds_beside_them(runs, capsys, tmp_path):
    (runs / "dino" / "eval" / "linear-photos.probe.json").write_text("{}")
    assert "skipped" not in compare_output(capsys, runs / "dino")
    for name in ("backbone.json", "data.json"):  # of a run without evaluations
        (tmp_path / name).write_text("{}")
    assert ".json" not in compare_error(capsys, tmp_path)
    write_result(tmp_path / "knn.json", "dino")
    assert "skipped" not in compare_output(capsys, tmp_path)


def test_comparison_skips_and_notes_an_old_result_in_a_folder(runs, capsys):
    (runs / "dino" / "eval" / "old.json").write_text(json.dumps(OLD))
    text = compare_output(capsys, runs / "dino")
    assert re.search(r"^skipped: .*old.json: written by ssl-vit 0.1.0 in format 2", text, re.MULTILINE)


def test_comparison_takes_file_names_with_an_equals_sign(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_result(tmp_path / "lr=0.1" / "eval" / "knn-photos.json", "tuned")
    assert "tuned" in compare_output(capsys, "lr=0.1/eval/knn-photos.json")
    assert "tuned" in compare_output(capsys, "lr=0.1")


def test_names_cannot_break_a_table(tmp_path):
    odd = "a|b*c_d & 50% $x$ {y} #1 ~ ^ \\ <td>\n\n% end"
    write_result(tmp_path / "a.json", odd, data=odd)
    comparison = compare(find_results([tmp_path / "a.json"]).results, mix=False)
    markdown = render(comparison, "markdown").split("\n\n")[0].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown}) == 1
    table = render(comparison, "latex").partition(r"\end{tabular}")[0]
    rows = [line for line in table.splitlines() if line.endswith(r" \\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [1] * len(rows)
    assert not re.findall(r"(?<!\\)[#%_]", table)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fuzz=st.data())
def test_comparison_refuses_or_reads_damaged_files_and_never_crashes(fuzz, runs):
    folder = runs / "dino" / "eval"
    kept = {path: path.read_bytes() for path in (folder / "knn-photos.json", folder / "knn-photos.npz")}
    path = fuzz.draw(st.sampled_from(sorted(kept)))
    content = bytearray(kept[path])
    for _ in range(fuzz.draw(st.integers(1, 4))):
        content[fuzz.draw(st.integers(0, len(content) - 1))] = fuzz.draw(st.integers(0, 255))
    cut = fuzz.draw(st.integers(0, len(content)))
    path.write_bytes(bytes(content[:cut]) if fuzz.draw(st.booleans()) else bytes(content))
    try:
        comparison = compare(find_results([folder, runs / "sit_longer"]).results, mix=True)
        for form in ("text", "markdown", "latex"):
            assert render(comparison, form)
    except UserError as error:
        assert str(error)
    finally:
        for each, before in kept.items():
            each.write_bytes(before)


def test_comparison_of_two_models_on_real_images(cifar, tmp_path, capsys):
    overrides = [f"data.root={cifar}", "data.num_workers=0", "data.image_size=32", "baselines=false", "k=[20]"]
    for size in ("tiny", "small"):
        model = f"checkpoint=random:vit_{size}_patch16_224"
        assert main(["knn", model, *overrides, f"out={tmp_path / f'{size}.json'}"]) == 0
    capsys.readouterr()
    results = find_results([tmp_path / "tiny.json", tmp_path / "small.json"]).results
    (paired,) = compare(results, mix=False).paired
    tiny, small = (result.score.metrics[0].value for result in results)
    assert paired.difference.n == 200
    assert paired.difference.value == pytest.approx(small - tiny)
    assert paired.difference.low <= paired.difference.value <= paired.difference.high
    assert (tmp_path / "tiny.png").stat().st_size > 20_000
    by_class = json.loads((tmp_path / "tiny.json").read_text())["by_class"]["classes"]
    assert [(row["name"], row["n"]) for row in by_class[:2]] == [("airplane", 20), ("automobile", 20)]
    assert "random-vit_small_patch16_224" in compare_output(capsys, tmp_path / "tiny.json", tmp_path / "small.json")


def test_comparison_shows_a_missing_value_as_a_dash(tmp_path, capsys):
    metric = Metric(name="top-1, k=20", value=float("nan"), n=4, low=np.nan, high=np.nan)
    odd = changed(make_result(), score=ModelScores(name="model", metrics=[metric]))
    odd.write(tmp_path / "a.json")
    assert "–" in compare_output(capsys, tmp_path / "a.json")
