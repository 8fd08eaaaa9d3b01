"""`ssl-vit compare`: one table of several models, paired tests, and no column that mixes what does not belong."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_vit.cli import main
from ssl_vit.evaluation.results.comparison import compare
from ssl_vit.evaluation.results.comparison_tables import render
from ssl_vit.evaluation.results.eval_result import Metric, ModelScores, Predictions
from ssl_vit.evaluation.results.result_reader import find_records, read_answers, read_record
from ssl_vit.evaluation.results.statistics import difference
from ssl_vit.runtime.errors import UserError
from tests.helpers.results import COUNT, record, refused, right, shown, written


@pytest.fixture
def runs(tmp_path):
    """Two run folders with kNN and a linear probe each."""
    for number, (name, share) in enumerate({"dino": 0.6, "sit_longer": 0.75}.items()):
        folder = tmp_path / "runs" / name / "eval"
        written(folder / "knn-photos.json", name, share, seed=number)
        written(folder / "linear-photos.json", name, share + 0.1, seed=number, task="linear")
    return tmp_path / "runs"


def test_a_block_for_each_evaluation_with_the_models_side_by_side(runs, capsys):
    lines = shown(capsys, runs / "dino", runs / "sit_longer").splitlines()
    knn, measured, _, linear = lines[:4]
    # Baselines that are equal for both models stand once, others for each.
    names = ["dino", "sit_longer", "random init of dino", "random init of sit_longer", "raw pixels"]
    assert re.split(r"  +", knn) == ["knn on photos, in %", *names]
    share = float(right(0.6, 0).float().mean())
    metric, of_dino, *_ = re.split(r"  +", measured)
    assert metric == "top-1, k=20"
    assert of_dino.startswith(f"{100 * share:.1f} ± ")
    assert linear.startswith("linear on photos, in %")


def test_markdown_has_models_as_rows_and_metrics_as_columns(runs, capsys):
    head, _, *rows = shown(capsys, runs / "dino", runs / "sit_longer", "format=markdown").splitlines()
    assert head == "| in % | knn on photos<br>top-1, k=20 | linear on photos<br>top-1 |"
    assert [row.split()[1] for row in rows[:5]] == ["dino", "sit\\_longer", "random", "random", "raw"]


def test_each_model_is_held_against_the_first_in_pairs(runs, capsys):
    text = shown(capsys, runs / "dino", runs / "sit_longer")
    found = difference(right(0.6, 0), right(0.75, 1))
    row = next(line for line in text.splitlines() if line.startswith("knn on photos, top-1, k=20"))
    assert "sit_longer - dino" in row
    points = f"{100 * found.value:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
    assert points in row
    assert row.split()[-4:-2] == [str(found.gained), str(found.lost)]
    assert "corrected for these 2 comparisons" in text  # by Holm's method
    comparison = compare(find_records([runs / "dino", runs / "sit_longer"]).records, mix=False)
    smaller, larger = sorted(comparison.paired, key=lambda one: one.found.p)
    assert smaller.corrected == pytest.approx(min(1, 2 * smaller.found.p))
    assert larger.corrected == pytest.approx(max(smaller.corrected, larger.found.p))


def test_markdown_has_the_best_in_bold(runs, capsys, tmp_path):
    text = shown(capsys, runs / "dino", runs / "sit_longer", "format=markdown", f"out={tmp_path / 'a' / 'table.md'}")
    table = text.split("\n\n")[0].splitlines()
    assert {line.count("|") for line in table} == {4}
    assert table[2].count("**") == 0
    assert table[3].startswith("| sit\\_longer | **")
    assert table[3].count("**") == 4
    assert (tmp_path / "a" / "table.md").read_text().startswith("\n".join(table))


def test_latex_is_well_formed(runs, capsys):
    text = shown(capsys, runs / "dino", runs / "sit_longer", "format=latex")
    first = text[: text.index(r"\end{tabular}")]
    rows = [line for line in first.splitlines() if line.endswith(r" \\")]
    assert [row.count("&") for row in rows] == [2, 2, 2, 2, 2, 2, 2]
    assert rows[0].count(r"\multicolumn{1}{c}") == 2
    assert r"sit\_longer & \textbf{" in first
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    plain = re.sub(r"\\[a-z]+|\\[&%$#_{}\\]", "", "\n".join(line.partition("% ")[0] for line in text.splitlines()))
    assert plain.count("{") == plain.count("}")
    assert not set("_#%") & set(plain)


def test_one_record_alone_is_a_table_too(runs, capsys):
    text = shown(capsys, runs / "dino" / "eval" / "knn-photos.json", "format=markdown")
    assert "| raw pixels | " in text
    assert "**" not in text
    assert "Paired" not in text


def test_other_protocols_and_other_images_are_not_mixed(tmp_path, capsys):
    a = written(tmp_path / "a.json", "a", k=[20])
    b = written(tmp_path / "b.json", "b", k=[10], temperature=0.1)
    error = refused(capsys, a, b)
    assert "knn on photos" in error
    assert "protocol.temperature: 0.07 | 0.1" in error
    assert "protocol.k: [20] | [10]" in error
    assert "image_size" not in error
    assert "mix=true" in error
    text = shown(capsys, a, b, "mix=true")
    assert [line[:17] for line in text.splitlines() if line.startswith("knn on photos [")] == [
        "knn on photos [1]",
        "knn on photos [2]",
    ]
    assert "protocol.temperature: 0.07 | 0.1" in text
    assert "Paired" not in text
    c = tmp_path / "c.json"
    other = record("c", k=[20])
    replace(other, data={**other.data, "fingerprints": ["a", "c"]}).write(c)
    assert 'data.fingerprints: ["a", "b"] | ["a", "c"]' in refused(capsys, a, c)


def test_other_tasks_and_data_sets_have_columns_of_their_own(tmp_path, capsys):
    a = written(tmp_path / "a.json", "a")
    b = written(tmp_path / "b.json", "b", data="other")
    photos, first, _, other, second, *_ = shown(capsys, a, b).splitlines()
    assert photos.startswith("knn on photos, in %")
    assert other.startswith("knn on other, in %")
    assert first.split()[2] != "–"
    assert second.split()[2] == "–"  # a was not measured on the other


def test_missing_answers_are_told_and_the_table_is_shown(runs, capsys):
    (runs / "dino" / "eval" / "knn-photos.npz").unlink()
    text = shown(capsys, runs / "dino", runs / "sit_longer")
    assert "not compared in pairs for knn on photos" in text
    assert "knn-photos.json lacks its answers (knn-photos.npz)" in text
    assert "corrected for this 1 comparison" in text  # of the linear probe


def test_answers_of_another_evaluation_are_not_taken(tmp_path):
    path = written(tmp_path / "a.json", "a")
    old = path.read_text()
    assert read_answers(read_record(path), ", k=20") is not None
    assert read_answers(read_record(path), ", k=3") is None
    written(path, "a", 0.9)
    path.write_text(old)
    assert read_answers(read_record(path), ", k=20") is None


def test_images_are_paired_by_their_place(tmp_path):
    """An image that one evaluation could not read is left out for both."""
    both = [record("a", 0.5, seed=1), record("b", 0.5, seed=2)]
    answers = both[1].score.answers[", k=20"]
    kept = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:-7]
    fewer = Predictions(*(part[kept] for part in answers))
    both[1] = replace(both[1], score=replace(both[1].score, answers={", k=20": fewer}))
    for name, one in zip("ab", both, strict=True):
        one.write(tmp_path / f"{name}.json")
    (paired,) = compare(find_records([tmp_path]).records, mix=False).paired
    assert paired.found == difference(right(0.5, 1)[kept], right(0.5, 2)[kept])


def test_the_same_name_with_other_weights_is_another_model(tmp_path, capsys):
    a, b = written(tmp_path / "a.json", "a"), tmp_path / "b.json"
    other = record("a", 0.7, seed=3)
    replace(other, model={**other.model, "sha256": "f" * 64}).write(b)
    text = shown(capsys, a, b, a)
    assert "a (00000000)" in text
    assert "a (ffffffff)" in text
    again = written(tmp_path / "c.json", "a", 0.8)
    assert "several records of a for knn on photos" in shown(capsys, a, again)


def test_what_is_no_record_is_refused_in_words(tmp_path, capsys, runs):
    def file(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    assert "no such file" in refused(capsys, tmp_path / "nowhere.json")
    assert "name too long" in refused(capsys, "x" * 5000)
    assert "no JSON" in refused(capsys, file("a.json", "{"))
    assert "no JSON" in refused(capsys, file("b.json", b"\xff\x00"))
    assert "no JSON" in refused(capsys, file("c.json", "[" * 100_000))
    assert "not a record" in refused(capsys, file("d.json", "[1]"))
    assert "not a record" in refused(capsys, file("e.json", '{"schema": 2}'))
    assert "schema 1, and schema 2 is read" in refused(capsys, file("f.json", '{"schema": 1, "task": "knn"}'))
    assert "look at answers, baselines" in refused(capsys, file("g.json", '{"schema": 2, "task": "knn"}'))
    whole = json.loads((runs / "dino" / "eval" / "knn-photos.json").read_text())
    deep = json.dumps({**whole, "protocol": "deep"}).replace('"deep"', '{"a":' * 5000 + "1" + "}" * 5000)
    assert re.search("nested too deeply|no JSON", refused(capsys, file("h.json", deep)))
    (tmp_path / "empty" / "eval").mkdir(parents=True)
    assert "there is no record in this folder" in refused(capsys, tmp_path / "empty")
    assert "name records or run folders" in refused(capsys)
    assert "format" in refused(capsys, runs, "format=html")
    assert "foo: unknown key" in refused(capsys, runs, "foo=1")


def test_the_classifier_beside_a_record_is_no_record(runs, capsys):
    (runs / "dino" / "eval" / "linear-photos.probe.json").write_text("{}")
    assert "left out" not in shown(capsys, runs / "dino")


def test_an_old_record_in_a_folder_is_left_out_and_said(runs, capsys):
    (runs / "dino" / "eval" / "old.json").write_text('{"schema": 1, "task": "knn"}')
    text = shown(capsys, runs / "dino")
    assert "left out" in text
    assert "old.json: a record of schema 1" in text


def test_files_with_an_equals_sign_are_words_too(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "lr=0.1" / "eval" / "knn-photos.json", "tuned")
    assert "tuned" in shown(capsys, "lr=0.1/eval/knn-photos.json")
    assert "tuned" in shown(capsys, "lr=0.1")


def test_names_cannot_break_a_table(tmp_path):
    odd = "a|b*c_d & 50% $x$ {y} #1 ~ ^ \\ <td>\n\n% end"
    written(tmp_path / "a.json", odd, data=odd)
    comparison = compare(find_records([tmp_path / "a.json"]).records, mix=False)
    markdown = render(comparison, "markdown").split("\n\n")[0].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown}) == 1
    table = render(comparison, "latex").partition(r"\end{tabular}")[0]
    rows = [line for line in table.splitlines() if line.endswith(r" \\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [1] * len(rows)
    assert not re.findall(r"(?<!\\)[#%_]", table)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fuzz=st.data())
def test_damaged_files_are_refused_or_read_and_never_crash(fuzz, runs):
    folder = runs / "dino" / "eval"
    kept = {path: path.read_bytes() for path in (folder / "knn-photos.json", folder / "knn-photos.npz")}
    path = fuzz.draw(st.sampled_from(sorted(kept)))
    content = bytearray(kept[path])
    for _ in range(fuzz.draw(st.integers(1, 4))):
        content[fuzz.draw(st.integers(0, len(content) - 1))] = fuzz.draw(st.integers(0, 255))
    cut = fuzz.draw(st.integers(0, len(content)))
    path.write_bytes(bytes(content[:cut]) if fuzz.draw(st.booleans()) else bytes(content))
    try:
        comparison = compare(find_records([folder, runs / "sit_longer"]).records, mix=True)
        for form in ("text", "markdown", "latex"):
            assert render(comparison, form)
    except UserError as error:
        assert str(error)
    finally:
        for each, before in kept.items():
            each.write_bytes(before)


def test_two_models_on_real_images(cifar, tmp_path, capsys):
    words = [f"data.root={cifar}", "data.num_workers=0", "data.image_size=32", "baselines=false", "k=[20]"]
    for size in ("tiny", "small"):
        network = f"checkpoint=random:vit_{size}_patch16_224"
        assert main(["knn", network, *words, f"out={tmp_path / f'{size}.json'}"]) == 0
    capsys.readouterr()
    records = find_records([tmp_path / "tiny.json", tmp_path / "small.json"]).records
    (paired,) = compare(records, mix=False).paired
    tiny, small = (record.score.metrics[0].value for record in records)
    assert paired.found.n == 200
    assert paired.found.value == pytest.approx(small - tiny)
    assert paired.found.low <= paired.found.value <= paired.found.high
    assert (tmp_path / "tiny.png").stat().st_size > 20_000
    by_class = json.loads((tmp_path / "tiny.json").read_text())["by_class"]["classes"]
    assert [(row["name"], row["n"]) for row in by_class[:2]] == [("airplane", 20), ("automobile", 20)]
    assert "random-vit_small_patch16_224" in shown(capsys, tmp_path / "tiny.json", tmp_path / "small.json")


def test_a_metric_that_is_no_number_is_a_dash(tmp_path, capsys):
    odd = replace(record(), score=ModelScores("model", [Metric("top-1, k=20", float("nan"), 4, np.nan, np.nan)], {}))
    odd.write(tmp_path / "a.json")
    assert "–" in shown(capsys, tmp_path / "a.json")
