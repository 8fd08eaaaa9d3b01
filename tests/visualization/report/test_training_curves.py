"""The report's curves are what metrics.csv holds, whatever state it is in."""

import math

import pytest

from ssl_vit.visualization.report.training_curves import POINTS, load_curves

HEADER = "step,epoch,train/loss,train/teacher_entropy,schedule/lr,schedule/weight_decay\n"


def curves(tmp_path, text, prototypes=None):
    (tmp_path / "metrics.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = load_curves(tmp_path / "metrics.csv", prototypes)
    return {curve.title: curve for curve in found[0]}, found[1]


def test_load_curves_of_no_file_and_no_row(tmp_path):
    assert load_curves(tmp_path / "metrics.csv", None) == ([], "")
    assert curves(tmp_path, HEADER)[0] == {}
    assert curves(tmp_path, b"\xff\xfe\x00 no table")[0] == {}


def test_load_curves_skips_a_truncated_last_line(tmp_path):
    found, _ = curves(tmp_path, HEADER + "9,0,4.0,,0.1,0.04\n19,0,3.0,,0.2,0.04\n29,0,2.")
    assert found["Loss"].lines == {"loss": [(9, 4.0), (19, 3.0)]}


def test_load_curves_takes_the_later_value_of_a_duplicate_step(tmp_path):
    found, _ = curves(tmp_path, HEADER + "9,0,4.0,,,\n19,0,3.0,,,\n9,0,5.0,,,\n")
    assert found["Loss"].lines == {"loss": [(9, 5.0), (19, 3.0)]}


def test_load_curves_counts_values_that_are_no_numbers(tmp_path):
    found, how = curves(tmp_path, HEADER + "9,0,nan,,,\n19,0,inf,,,\n29,0,2.0,,,\n39,0,what,,,\n")
    assert found["Loss"].lines == {"loss": [(29, 2.0)]}
    assert "2 of train/loss" in how


def test_load_curves_skips_rows_of_another_width_and_without_a_step(tmp_path):
    found, _ = curves(tmp_path, HEADER + "9,0,4.0\n,0,3.0,,,\n-1,0,3.0,,,\n19,0,3.0,,,,7\n29,0,1.0,,,\n")
    assert found["Loss"].lines == {"loss": [(29, 1.0)]}


def test_load_curves_omits_constant_schedules(tmp_path):
    found, _ = curves(tmp_path, HEADER + "9,0,4.0,,0.1,0.04\n19,0,3.0,,0.2,0.04\n")
    assert found.keys() == {"Loss", "Learning rate"}


def test_load_curves_teacher_entropy_has_ln_k_as_baseline(tmp_path):
    found, _ = curves(tmp_path, HEADER + "9,0,4.0,3.0,,\n", prototypes=64)
    assert found["Teacher's assignment"].baseline == pytest.approx(math.log(64))


def test_load_curves_loss_parts_share_axes_but_one_part_alone_is_the_loss(tmp_path):
    header = "step,epoch,train/loss,train/rotation,train/contrastive\n"
    found, _ = curves(tmp_path, header + "9,0,4.0,1.0,3.0\n")
    assert found["Loss"].lines.keys() == {"loss", "rotation", "contrastive"}
    found, _ = curves(tmp_path, header + "9,0,4.0,4.0,\n")
    assert found["Loss"].lines.keys() == {"loss"}


def test_load_curves_reduces_long_runs_to_means(tmp_path):
    rows = "".join(f"{step},0,{step}.0,,,\n" for step in range(1000))
    found, how = curves(tmp_path, HEADER + rows)
    line = found["Loss"].lines["loss"]
    assert len(line) <= POINTS
    assert line[0] == (3, 1.5)
    assert line[-1] == (999, 997.5)
    assert "mean of 4 rows" in how


def test_load_curves_accuracies_have_random_weights_as_baseline_only_if_measured(tmp_path):
    header = "step,epoch,online/knn@20,online/linear,online/seconds\n"
    found, _ = curves(tmp_path, header + "0,0,0.2,0.3,9\n9,0,0.5,0.6,9\n")
    assert found["Online accuracy, kNN, k = 20"].baseline == 0.2
    assert found["Online accuracy, linear head"].baseline == 0.3
    assert len(found) == 2
    found, _ = curves(tmp_path, header + "9,0,0.5,0.6,9\n")
    assert found["Online accuracy, kNN, k = 20"].baseline is None


def test_load_curves_draws_columns_of_any_method_on_axes_of_their_own(tmp_path):
    found, _ = curves(
        tmp_path, "step,epoch,train/loss,train/std_weight,speed/other\n9,0,4.0,0.5,1.0\n19,0,3.0,0.7,2.0\n"
    )
    assert found.keys() == {"Loss", "Std weight"}
    assert found["Std weight"].lines == {"std weight": [(9, 0.5), (19, 0.7)]}
