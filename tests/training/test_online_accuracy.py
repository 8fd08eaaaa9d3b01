"""Tests of what a run from weights says about itself: whether it helped, and what it forgot."""

import json

import pytest
import torch

from ssl_vit.cli import main
from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.evaluation.results.comparison import paired_change
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.training.callbacks.run_checkpoint import RunCheckpoint
from tests.helpers.cli import assert_same_run, checkpoint, rows, state


@pytest.fixture
def words(pretrain_words):
    """A function: the words of a `pretrain` command from a checkpoint."""
    return lambda source, *more: [
        *(word for word in pretrain_words() if not word.startswith("backbone")),
        *(f"checkpoint={source}", *more),
    ]


@pytest.fixture
def config(words):
    return lambda source, *more: load_config("pretrain", words(source, *more), PretrainConfig)


def labeled(sample, *more):
    return (f"online.root={sample}", "online.every_epochs=1", "trainer.max_steps=10", *more)


RUIN = ("start.freeze_backbone=0%", "start.ramp=0%", "start.backbone_lr=0.3", "method.optimizer.grad_clip=0")


def verdicts(path):
    return [json.loads(line) for line in (path / "health.jsonl").open()]


def callback_state(path, name="last.ckpt"):
    return checkpoint(path, name)["callbacks"]["OnlineEval"]


def test_ruined_run_is_worse_than_start_and_its_best_checkpoint_is_the_start(tiny_model, sample, config, capsys):
    path = pretrain(config(tiny_model, *labeled(sample, f"online.reference={sample}", *RUIN)))
    printed = capsys.readouterr().out
    marks = callback_state(path)
    for prefix, name in (("online", "worse-than-start"), ("reference", "forgetting")):
        points = marks if prefix == "online" else marks["reference"]
        before, after = (points[point]["right"][f"{prefix}/knn@20"] == 1 for point in ("initial", "last"))
        metric = "knn@20" if prefix == "online" else "reference/knn@20"
        change = paired_change(metric, before, after)
        assert str(change) in printed
        assert f"Verdict: [{name}]" in printed
        (entry,) = [entry for entry in verdicts(path) if entry["name"] == name]
        assert str(change) in entry["finding"]
        assert "start.backbone_lr" in entry["remedy"]
        assert rows(path)[0][f"{prefix}/knn@20"] == str(change.before)
    assert "start weights" in printed
    assert "random weights" not in printed
    assert "the start weights, as none were better" in printed
    best = load_backbone(path / "checkpoints" / "best_knn.ckpt").backbone.vit.state_dict()
    assert all(
        torch.equal(best[name], value) for name, value in load_backbone(tiny_model).backbone.vit.state_dict().items()
    )
    assert not (path / "checkpoints" / "previous.ckpt").exists() or state(path, "previous.ckpt")[1] > 0


def test_run_that_changes_little_has_no_verdict(tiny_model, sample, config, capsys):
    path = pretrain(config(tiny_model, *labeled(sample, "start.backbone_lr=1e-9")))
    printed = capsys.readouterr().out
    assert "knn@20 since the start weights: from " in printed
    assert "Verdict" not in printed
    assert not (path / "health.jsonl").exists()


@pytest.mark.parametrize("stops", [(2, 8), (5,)])
def test_resumed_run_prints_the_same_comparison_and_keeps_the_same_best(
    tiny_model, sample, config, stop_at, capsys, stops
):
    more = labeled(sample, f"online.reference={sample}", *RUIN)
    whole = pretrain(config(tiny_model, *more, "run.name=whole"))
    expected = [line for line in capsys.readouterr().out.splitlines() if "since the start" in line]
    for stop in stops:
        with stop_at(stop):
            pretrain(config(tiny_model, *more, "run.name=parts", "run.resume=auto"))
    capsys.readouterr()
    parts = pretrain(config(tiny_model, *more, "run.name=parts", "run.resume=true"))
    found = [line for line in capsys.readouterr().out.splitlines() if "since the start" in line]
    assert [line.replace("/parts/", "/whole/") for line in found] == expected
    assert sum("Verdict" in line for line in expected) == 2
    assert_same_run(whole, parts)
    assert str(callback_state(whole)) == str(callback_state(parts))
    assert state(parts, "best_knn.ckpt")[1] == state(whole, "best_knn.ckpt")[1] == 0


def test_run_killed_before_its_first_checkpoint_writes_the_start_again(tiny_model, sample, config, monkeypatch):
    more = labeled(sample, *RUIN)
    whole = pretrain(config(tiny_model, *more, "run.name=whole"))

    class Killed(BaseException):
        pass

    def kill(self, *_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunCheckpoint, "_save", kill)
        pretrain(config(tiny_model, *more, "run.name=parts"))
    parts = config(tiny_model, *more, "run.name=parts").run.path
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["best_knn.ckpt"]
    pretrain(config(tiny_model, *more, "run.name=parts", "run.resume=auto"))
    assert_same_run(whole, parts)
    assert str(callback_state(whole)) == str(callback_state(parts))


def test_reference_added_on_resume_is_measured_at_the_start_weights(tiny_model, sample, config, stop_at, capsys):
    with stop_at(4):
        pretrain(config(tiny_model, *labeled(sample, *RUIN)))
    more = labeled(sample, *RUIN, f"online.reference={sample}", "run.resume=true")
    path = pretrain(config(tiny_model, *more))
    assert "reference/knn@20 since the start weights" in capsys.readouterr().out
    fresh = pretrain(config(tiny_model, *more[:-1], "run.name=fresh"))
    initial, expected = (callback_state(each)["reference"]["initial"] for each in (path, fresh))
    assert str(initial) == str(expected)


def test_reference_without_a_checkpoint_or_classes_is_refused(
    pretrain_words, tiny_model, words, sample, tmp_path, capsys
):
    assert main(["pretrain", *pretrain_words(f"online.reference={sample}")]) == 2
    assert "add checkpoint=SOURCE" in capsys.readouterr().err
    one = next((sample / "test").iterdir())
    assert main(["pretrain", *words(tiny_model, f"online.reference={one}", "online.every_epochs=1")]) == 2
    assert "two" in capsys.readouterr().err
