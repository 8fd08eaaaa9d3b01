"""A run that collapses says so, with numbers and remedies; a healthy one stays quiet."""

import math
import warnings

import pytest
import torch

from ssl_vit.commands.pretrain import pretrain
from ssl_vit.losses.diversity import effective_rank, spread
from ssl_vit.training.health import collapse

HEALTHY = {
    "train/loss": 4.0,
    "train/information": 2.0,
    "train/teacher_entropy": 4.0,
    "train/spread": 0.8,
}


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({}, None),
        ({"train/information": 0.01, "train/teacher_entropy": math.log(1024)}, "uniform answer"),
        ({"train/information": 0.01, "train/teacher_entropy": 0.1}, "one prototype"),
        ({"train/spread": 0.001}, "collapsed features"),
    ],
)
def test_each_collapse_has_its_name(numbers, says):
    verdict = collapse(HEALTHY | numbers, prototypes=1024)
    assert verdict is None if says is None else says in verdict
    if says:
        assert "Try " in verdict


def test_a_method_without_prototypes_is_judged_by_its_features():
    assert collapse({"train/loss": 4.0, "train/spread": 0.9}, prototypes=None) is None
    assert "collapsed features" in collapse({"train/loss": 4.0, "train/spread": 0.0}, prototypes=None)


def test_a_collapsing_run_is_told_and_a_healthy_one_is_not(pretrain_config, capsys):
    """A teacher temperature of 5 makes every answer the uniform one."""
    words = ("trainer.max_steps=24", "method.optimizer.warmup=0steps")
    with pytest.warns(UserWarning, match="collapsed to the uniform answer"):
        pretrain(pretrain_config(*words, "method.teacher.temperature=5.0", "run.name=collapsing"))
    assert "Health: collapsed to the uniform answer" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "collapsed")
        pretrain(pretrain_config(*words, "run.name=healthy"))
    assert "Health" not in capsys.readouterr().out


def test_spread_is_one_for_features_all_over_the_sphere_and_zero_for_equal_ones():
    generator = torch.Generator().manual_seed(0)
    assert spread(torch.randn(4000, 64, generator=generator)).item() == pytest.approx(1, abs=0.02)
    assert spread(torch.ones(100, 64)).item() == pytest.approx(0, abs=1e-6)


def test_effective_rank_counts_directions():
    """RankMe of k orthogonal directions of equal strength is k; scale does not matter."""
    for k in (1, 3, 8):
        features = torch.eye(8)[:k].repeat(10, 1)
        assert effective_rank(features).item() == pytest.approx(k, rel=1e-3)
        assert effective_rank(100 * features).item() == pytest.approx(k, rel=1e-3)
