"""Tests of health warnings before and during a run, and of the statistics behind them."""

import json
import math
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.methods.health import check_assignments, check_feature_std, check_teacher_distance
from ssl_vit.methods.schedules import make_plan
from ssl_vit.models.ema import relative_parameter_distance
from ssl_vit.models.feature_statistics import alignment, effective_rank, feature_std, uniformity
from ssl_vit.training.callbacks.health_monitor import check_metrics
from ssl_vit.training.config_check import check_config, check_start
from ssl_vit.training.start import Start
from ssl_vit.training.trainer import build_method
from tests.helpers.cli import rows, state

HEALTHY = {
    "train/loss": 4.0,
    "train/assignment_mutual_information": 2.0,
    "train/teacher_entropy": 4.0,
    "train/teacher_distance": 0.1,
    "train/feature_std": 0.8,
}


# --- before the first step -------------------------------------------------------------------------------------


def names(config, num_images):
    plan = make_plan(config, num_images)
    method = build_method(config, plan)
    return [verdict.name for verdict in check_config(config.method, plan, method.peak_lr)]


SOUND = ("trainer.max_steps=2000", "trainer=auto", "trainer.accelerator=cpu")


@pytest.mark.parametrize(
    ("words", "num_images", "expected"),
    [
        ((), 1600, []),
        (("method=sit",), 1600, []),
        ((), 160, ["short-epochs"]),  # 10 steps an epoch, and the last layer frozen for one epoch
        (("method.freeze_last_layer=10steps",), 160, []),
        (("method.freeze_last_layer=0epochs",), 160, []),
        (("method=sit", "method.optimizer.warmup=2epochs"), 160, ["short-epochs"]),
        (("method.optimizer.lr=0.05", "method.optimizer.lr_batch_size=16"), 1600, ["learning-rate"]),
        (("method.optimizer.lr=0.000001",), 1600, ["learning-rate"]),  # x 16/256
        (("method.teacher.temperature=0.3",), 1600, ["hot-teacher"]),
        (("method.teacher.warmup_temperature=0.1",), 1600, ["hot-teacher"]),
        (("method.teacher.momentum=[0.0,1.0]",), 1600, ["teacher-is-student"]),
        (("method.teacher.momentum=[0.9996,1.0]",), 1600, ["slow-teacher"]),
        (("method.teacher.momentum=[1.0,1.0]",), 1600, ["slow-teacher"]),
        (("method.views.local_crops.size=96",), 1600, ["large-locals"]),
        (("method.views.local_crops.size=96", "method.views.local_crops.count=0"), 1600, []),
    ],
)
def test_check_config_finds_likely_problems(pretrain_config, words, num_images, expected):
    assert names(pretrain_config(*SOUND, *words), num_images) == expected


def test_check_config_warnings_are_printed_and_logged(pretrain_config, capsys):
    run = pretrain(pretrain_config("method.teacher.temperature=0.3", "method.teacher.momentum=[0.5,1.0]"))
    told = [json.loads(line)["name"] for line in (run / "health.jsonl").open()]
    assert told == ["short-epochs", "hot-teacher", "slow-teacher"]
    output = capsys.readouterr().out
    assert "Health: [hot-teacher] a teacher temperature of 0.3 is above 0.07" in output
    assert "Health: [short-epochs] an epoch is only 12 steps, so method.freeze_last_layer=1 epoch may be" in output
    assert "as in method.freeze_last_layer=10%." in output


@pytest.mark.parametrize(
    ("steps", "momentum", "remedy"),
    [
        (300, 0.996, "'method.teacher.momentum=[0.98,0.995]'"),
        (100, 0.98, "'method.teacher.momentum=[0.96,0.995]'"),  # the proposal is another value than the one that is set
        (20, 0.98, "Train longer."),
    ],
)
def test_check_config_proposes_a_momentum_that_fits_the_run(pretrain_config, steps, momentum, remedy):
    given = (f"method.teacher.momentum=[{momentum},1.0]", "method.freeze_last_layer=0epochs")
    config = pretrain_config(f"trainer.max_steps={steps}", *given)
    (warning,) = check_config(config.method, make_plan(config, 160), peak_lr=1e-3)
    assert warning.name == "slow-teacher"
    assert remedy in warning.remedy
    shorter = pretrain_config(f"trainer.max_steps={steps}", *given, "method.teacher.momentum=[0.96,0.995]")
    assert bool(check_config(shorter.method, make_plan(shorter, 160), peak_lr=1e-3)) == (steps == 20)


def start_names(tiny_model, pretrain_words, *more):
    """Names of the warnings about a run from weights, and the config."""
    words = [word for word in pretrain_words(*SOUND) if not word.startswith("backbone")]
    if "method=sit" in more:
        words = [word for word in words if not word.startswith("method.")]
    config = load_config("pretrain", [*words, f"checkpoint={tiny_model}", *more], PretrainConfig)
    plan = make_plan(config, 1600)
    start = Start(config, SimpleNamespace(checkpoint=None, train=range(1600), path=config.run.path))
    start.run.path.mkdir(parents=True)
    method = build_method(config, plan, start.prepare)
    found = check_start(config, plan, method.rates, method.peak_lr, start.facts)
    return [warning.name for warning in check_config(config.method, plan, method.peak_lr) + found]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((), []),
        (("method=sit",), []),
        (("start.freeze_backbone=0%",), ["random-heads"]),
        (("start.backbone_lr=3e-5",), ["high-backbone-lr"]),
        (("start.backbone_lr=1e-4", "start.trainable=lora_2"), []),
        (("start.backbone_lr=null",), ["high-backbone-lr"]),
        (
            ("start=scratch", "method.teacher.half_life=2%"),
            ["random-heads", "frozen-last-layer", "high-backbone-lr", "high-weight-decay"],
        ),
        (("method.freeze_last_layer=20%",), ["frozen-last-layer"]),
        (("method.freeze_last_layer=10%",), []),
        (("method.optimizer.weight_decay=[0.04,0.4]",), ["high-weight-decay"]),
        (("backbone.drop_path=0.3",), ["high-drop-path"]),
        (("method.views.mean=[0.4,0.4,0.4]",), ["other-normalization"]),
        (("method.teacher.half_life=null", "method.teacher.momentum=[0.9999,1.0]"), ["slow-teacher"]),
    ],
)
def test_check_start_names_what_destroys_features(tiny_model, pretrain_words, more, expected):
    assert start_names(tiny_model, pretrain_words, *more) == expected


def test_check_start_warnings_are_printed_and_logged(tiny_model, pretrain_words, capsys):
    words = [word for word in pretrain_words() if not word.startswith("backbone")]
    more = (f"checkpoint={tiny_model}", "start.freeze_backbone=0%", "backbone.drop_path=0.2")
    run = pretrain(load_config("pretrain", [*words, *more], PretrainConfig))
    told = [json.loads(line)["name"] for line in (run / "health.jsonl").open()]
    assert told == ["slow-teacher", "random-heads", "high-drop-path"]
    assert "Health: [random-heads] the heads are new" in capsys.readouterr().out


# --- as it happens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ({}, None),
        ({"train/assignment_mutual_information": 0.01, "train/teacher_entropy": math.log(1024)}, "uniform-collapse"),
        ({"train/assignment_mutual_information": 0.01, "train/teacher_entropy": 0.1}, "single-collapse"),
        ({"train/feature_std": 0.001}, "features-collapse"),
        ({"train/teacher_distance": 0.0}, "teacher-is-student"),
        ({"train/loss": 6.1}, "diverging"),
        ({"train/loss": math.nan}, "diverging"),
        ({"train/loss": 5.9}, None),
    ],
)
def test_check_metrics_names_each_problem(numbers, name):
    checks = [check_teacher_distance, partial(check_assignments, prototypes=1024), check_feature_std]
    verdict = check_metrics(HEALTHY | numbers, checks, first_loss=4.0)
    assert verdict is None if name is None else verdict.name == name
    if name:
        assert verdict.remedy


def test_check_metrics_needs_no_teacher():
    checks = [check_feature_std]
    assert check_metrics({"train/loss": 4.0, "train/feature_std": 0.9}, checks, first_loss=None) is None
    verdict = check_metrics({"train/loss": 4.0, "train/feature_std": 0.0}, checks, first_loss=None)
    assert verdict.name == "features-collapse"
    # A loss with learned weights can be negative.
    assert check_metrics({"train/loss": -1.0, "train/feature_std": 0.9}, checks, first_loss=-1.5) is None


DRIVEN = {
    "uniform-collapse": ("method.teacher.temperature=5.0",),  # every answer is the uniform one
    "single-collapse": ("method.teacher.temperature=0.00001", "method.teacher.center_momentum=1.0"),
    "teacher-is-student": ("method.teacher.momentum=[0.0,0.0]",),
    "diverging": ("method=sit", "method.weighting=fixed", "method.optimizer.grad_clip=0", "method.optimizer.lr=200.0"),
}


@pytest.mark.parametrize("name", DRIVEN)
def test_health_monitor_warns_of_a_bad_run(pretrain_config, capsys, monkeypatch, name):
    if name == "single-collapse":
        from ssl_vit.losses.dino import FactoredLogits
        from ssl_vit.methods.heads import Prototypes

        def one_wins(self, z):  # whatever the image: the first logit is 100 higher
            constant, first = torch.ones(len(z), 1), 100 * torch.eye(len(self.weight_v))[:, :1]
            return FactoredLogits(
                torch.cat([z, constant], dim=1), torch.cat([self.weight_v, first], dim=1), self.weight_g.squeeze(1)
            )

        monkeypatch.setattr(Prototypes, "forward", one_wins)
    words = ("trainer.max_steps=24", "method.optimizer.warmup=0steps", *DRIVEN[name])
    with pytest.warns(UserWarning, match=rf"\[{name}\]"):
        run = pretrain(pretrain_config(*words))
    assert f"Health: [{name}]" in capsys.readouterr().out
    told = [json.loads(line) for line in (run / "health.jsonl").open()]
    assert name in [verdict["name"] for verdict in told]
    assert all(verdict["finding"] and verdict["remedy"] for verdict in told)


def test_health_monitor_is_silent_in_a_healthy_run(pretrain_config, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r".*\[[a-z-]+\]")
        run = pretrain(pretrain_config("trainer.max_steps=24", "method.optimizer.warmup=0steps"))
    told = [json.loads(line)["name"] for line in (run / "health.jsonl").open()]
    assert told == ["short-epochs", "slow-teacher"]  # of so short a run
    assert all(float(row["train/teacher_distance"]) >= 0 for row in rows(run))
    assert state(run)[1] == 24


def test_relative_parameter_distance_is_relative():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert relative_parameter_distance(other, one) == 0
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 3
    assert relative_parameter_distance(other, one).item() == pytest.approx(2)


def test_feature_std_is_one_on_the_sphere_and_zero_for_equal_features():
    generator = torch.Generator().manual_seed(0)
    assert feature_std(torch.randn(4000, 64, generator=generator)).item() == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(100, 64)).item() == pytest.approx(0, abs=1e-6)


def test_effective_rank_counts_directions():
    """RankMe of k orthogonal directions of equal strength is k; scale does not matter."""
    for k in (1, 3, 8):
        features = torch.eye(8)[:k].repeat(10, 1)
        assert effective_rank(features).item() == pytest.approx(k, rel=1e-3)
        assert effective_rank(100 * features).item() == pytest.approx(k, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("near", [1.0, 1e-3])
def test_alignment_and_uniformity_are_those_of_a_textbook(dtype, near):
    """Also of features that hardly differ, and within autocast."""
    from tests.reference import losses as slow

    generator = torch.Generator().manual_seed(0)
    one, other = (near * torch.randn(2, 60, 16, generator=generator, dtype=torch.float64) + 1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment(one, other), uniformity(one)
    expected = slow.alignment(one.double().numpy(), other.double().numpy()), slow.uniformity(one.double().numpy())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert [value.item() for value in found] == pytest.approx(expected, rel=tolerance, abs=tolerance * near**2)
    assert {value.dtype for value in found} == {torch.promote_types(dtype, torch.float32)}


def test_alignment_and_uniformity_at_their_ends():
    features = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0))
    assert alignment(features, 7 * features).item() == pytest.approx(0, abs=1e-6)
    assert alignment(features, -features).item() == pytest.approx(4)
    assert uniformity(torch.ones(9, 4)).item() == 0
    assert uniformity(features).item() == pytest.approx(-4, abs=0.05)
    assert uniformity(features[:1]).isnan()  # no pair
    features[3, 2] = torch.nan
    assert uniformity(features).isnan()
    assert alignment(features, features).isnan()


def test_alignment_and_uniformity_do_not_wait_for_a_gpu():
    from tests.reference.fake_gpu import FakeGPU

    with FakeGPU():
        features = torch.ones(8, 4).to("cuda", non_blocking=True)
        assert alignment(features, features).device.type == uniformity(features).device.type == "cuda"
