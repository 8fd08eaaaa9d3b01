"""Runs that start from weights: what is loaded, frozen, anchored and resumed."""

import json
import shutil

import numpy as np
import pytest
import scipy.stats
import torch

from ssl_vit.cli import main
from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.methods.base import SSLMethod
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.errors import UserError
from tests.helpers.cli import assert_same_run, state

LIVELY = ("start.backbone_lr=1e-3", "backbone.drop_path=0.1")  # so that a difference would show


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


@pytest.fixture(scope="module")
def run(tmp_path_factory, sample):
    """A short DINO run, which others start from."""
    folder = tmp_path_factory.mktemp("source")
    from tests.conftest import SHRUNK, SHRUNK_DINO

    overrides = [*SHRUNK, *SHRUNK_DINO, f"data.root={sample / 'train'}", f"run.folder={folder}", "run.name=source"]
    return pretrain(load_config("pretrain", [*overrides, "backbone.reg_tokens=1"], PretrainConfig))


@pytest.fixture
def at_start(monkeypatch):
    """A list that gets each method's state before its first step."""
    states, original = [], SSLMethod.on_train_start

    def keep(self):
        states.append({name: value.clone() for name, value in self.state_dict().items()})
        original(self)

    monkeypatch.setattr(SSLMethod, "on_train_start", keep)
    return states


def backbone(state, model):
    prefix = f"{model}.backbone.vit."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- what is loaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "ckpt", "export", "student"])
def test_pretrain_from_each_source_begins_with_its_weights_in_student_and_teacher(run, config, at_start, kind):
    source = {"ckpt": run / "checkpoints" / "last.ckpt", "export": run / "backbone.safetensors"}.get(kind, run)
    weights = "student" if kind == "student" else "teacher"
    path = pretrain(config(source, f"weights={weights}", "method.head.prototypes=32"))
    expected = load_backbone(str(source), weights).backbone.vit.state_dict()
    assert equal(backbone(at_start[0], "student"), expected)
    assert equal(backbone(at_start[0], "teacher"), expected)
    first, teacher = (
        {k.partition(".")[2]: v for k, v in at_start[0].items() if k.startswith(m)} for m in ("student", "teacher")
    )
    assert equal(first, teacher)
    assert equal(load_backbone(path / "start.safetensors").backbone.vit.state_dict(), expected)
    assert json.loads((path / "start.json").read_text())["source"].startswith(str(source))


def test_pretrain_from_a_run_of_the_same_shape_takes_its_heads_and_center(run, config, at_start, capsys):
    pretrain(config(run))
    before = state(run)[0]
    for name, value in at_start[0].items():
        assert torch.equal(value, before[name.replace("student.", "teacher.")]), name
    assert "heads, prototypes and center are those of the checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("more", [("method.head.prototypes=32",), ("method.head.hidden_dim=24",)])
def test_pretrain_from_a_run_of_another_shape_draws_new_heads(run, config, at_start, capsys, more):
    pretrain(config(run, *more))
    assert not at_start[0]["center.value"].any()
    assert "the heads are new" in capsys.readouterr().out


def test_pretrain_with_sit_from_dino_and_back(run, words, at_start, tmp_path):
    base = [word for word in words(run) if not word.startswith(("method.head", "method.views.local"))]
    sit = pretrain(load_config("pretrain", [*base, "method=sit", "run.name=sit"], PretrainConfig))
    assert at_start[0]["student.backbone.vit.reg_token"].shape[1] == 2  # that of the source, and the rotation's
    again = pretrain(
        load_config("pretrain", [*base, f"checkpoint={sit}", "method=sit", "run.name=again"], PretrainConfig)
    )
    assert equal(at_start[1], state(sit)[0])
    pretrain(load_config("pretrain", words(again, "run.name=dino"), PretrainConfig))
    assert equal(backbone(at_start[2], "student"), backbone(state(again)[0], "student"))


def test_pretrain_from_weights_may_change_size_channels_and_registers(run, config, at_start, capsys):
    gray = ("backbone.in_chans=1", "method.views.mean=[0.5]", "method.views.std=[0.25]")
    pretrain(config(run, "backbone.img_size=32", "backbone.reg_tokens=3", *gray))
    printed = capsys.readouterr().out
    assert "position embeddings resampled once from 48 to 32 pixels" in printed
    assert "patch filters adapted from 3 to 1 channels" in printed
    assert "2 new registers" in printed
    assert equal(backbone(at_start[0], "student"), backbone(at_start[0], "teacher"))


def test_pretrain_takes_size_and_normalization_from_the_source(tiny_model, config):
    found = config(tiny_model)
    assert (found.backbone.img_size, found.backbone.embed_dim, found.method.views.global_crops.size) == (32, 48, 32)
    assert found.method.views.mean == [0.5] * 3
    assert found.start.name == "weights"
    assert config(tiny_model, "start=scratch").start.name == "scratch"
    assert config(tiny_model, "backbone.img_size=64").method.views.global_crops.size == 64


def test_preset_for_weights_wins_over_a_recipe_and_the_user_over_both(tiny_model, sample):
    words = ["recipe=cifar10_dino", f"data.root={sample}", f"checkpoint={tiny_model}"]
    found = load_config("pretrain", words, PretrainConfig)
    assert str(found.method.optimizer.warmup) == "5%"
    assert str(found.method.teacher.half_life) == "2%"
    assert found.data.batch_size == 64  # of the recipe
    found = load_config("pretrain", [*words, "method.optimizer.warmup=7steps"], PretrainConfig)
    assert str(found.method.optimizer.warmup) == "7 steps"


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["backbone.depth=5"], "backbone.depth=5, where the checkpoint has 2"),
        (["backbone.embed_dim=96"], "backbone.embed_dim=96, where the checkpoint has 48"),
        (
            ["backbone.patch_size=16", "method.views.local_crops.count=0"],
            "backbone.patch_size=16, where the checkpoint has 8",
        ),
        (["backbone=vit_small"], "brings its own architecture, so leave out backbone="),
        (["start.freeze_backbone=90%", "start.ramp=10%"], "the backbone would hardly learn"),
        (["start.trainable=last_9_blocks"], "the backbone has 2 blocks"),
        (["start.trainable=lora"], "start.trainable"),
        (["anchor=l2sp", "start.trainable=lora_2"], "anchor=l2sp"),
    ],
)
def test_pretrain_from_weights_refuses_a_contradiction_in_one_message(tiny_model, words, capsys, more, expected):
    assert main(["pretrain", *words(tiny_model, *more)]) == 2
    text = capsys.readouterr().err
    assert expected in text
    assert "Traceback" not in text


@pytest.mark.parametrize("more", [["start=weights"], ["anchor=gram"], ["start.trainable=norms"]])
def test_pretrain_without_a_checkpoint_refuses_what_needs_one(pretrain_words, capsys, more):
    assert main(["pretrain", *pretrain_words(*more)]) == 2
    assert "add checkpoint=SOURCE" in capsys.readouterr().err


# --- what is trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dino", "sit"])
def test_backbone_is_unchanged_bit_for_bit_while_it_is_frozen(tiny_model, words, stop_at, method):
    more = ("start.freeze_backbone=5steps", "start.ramp=2steps", "trainer.max_steps=12", *LIVELY)
    base = words(tiny_model, f"method={method}", *more)
    if method == "sit":
        base = [word for word in base if not word.startswith(("method.head", "method.views.local"))]
    with stop_at(5):
        path = pretrain(load_config("pretrain", base, PretrainConfig))
    start = load_backbone(path / "start.safetensors").backbone.vit.state_dict()
    assert equal(backbone(state(path)[0], "student"), start)
    if method == "dino":
        assert equal(backbone(state(path)[0], "teacher"), start)
    with stop_at(6):
        pretrain(load_config("pretrain", [*base, "run.resume=true"], PretrainConfig))
    after = backbone(state(path)[0], "student")
    assert all(not torch.equal(after[name], start[name]) for name in start if name.endswith("qkv.weight"))


@pytest.mark.parametrize(
    ("trainable", "changes"),
    [
        ("norms", lambda name: "norm" in name),
        ("last_1_blocks", lambda name: name.startswith(("blocks.1.", "norm."))),
        ("lora_2", lambda name: name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name),
    ],
)
def test_pretrain_changes_only_what_is_trainable(tiny_model, config, trainable, changes):
    more = (f"start.trainable={trainable}", "start.freeze_backbone=0%", "method.optimizer.lr=0.1", *LIVELY)
    path = pretrain(config(tiny_model, *more))
    start = load_backbone(tiny_model).backbone.vit.state_dict()
    for weights in ("student", "teacher"):
        after = load_backbone(path, weights).backbone.vit.state_dict()  # with LoRA merged
        assert {name for name in start if not torch.equal(start[name], after[name])} == {*filter(changes, start)}
    exported = load_backbone(path / "backbone.safetensors").backbone.vit.state_dict()
    assert equal(exported, load_backbone(path).backbone.vit.state_dict())


@pytest.mark.parametrize("anchor", ["gram", "l2sp", "features"])
@pytest.mark.parametrize("method", ["dino", "sit"])
def test_anchor_is_zero_while_frozen_and_holds_the_backbone_near(tiny_model, words, method, anchor, monkeypatch):
    terms = []
    original = SSLMethod.log_step
    monkeypatch.setattr(
        SSLMethod,
        "log_step",
        lambda self, result, *, first: (
            terms.append(float(result.logs["anchor"])) or original(self, result, first=first)
        ),
    )
    more = (f"method={method}", "start.freeze_backbone=3steps", "start.ramp=0%", "trainer.max_steps=20", *LIVELY)
    logged = ("backbone.drop_path=0.0", "trainer.log_every_n_steps=1", "trainer.precision=32-true", f"anchor={anchor}")
    base = [
        word
        for word in words(tiny_model, *more, *logged)
        if method == "dino" or not word.startswith(("method.head", "method.views.local"))
    ]
    for weight in (0.0, 100.0):
        overrides = [*base, f"anchor.weight={weight}", f"run.name={weight}"]
        pretrain(load_config("pretrain", overrides, PretrainConfig))
    free, held = terms[:20], terms[20:]
    assert max(free[:4] + held[:4]) < 1e-6  # at the first step after the freeze nothing has changed yet
    assert free[-1] > 1e-5
    assert held[-1] < free[-1] / 2


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "more"),
    [
        (3, ("anchor=gram",)),  # in the freeze
        (7, ("start.trainable=lora_2", "anchor=features")),  # in the ramp
        (12, ("anchor=l2sp", "start.trainable=last_1_blocks")),
    ],
)
def test_run_from_weights_resumed_without_its_source_equals_uninterrupted(
    tiny_model, config, stop_at, tmp_path, stop, more
):
    source = tmp_path / "moved" / "backbone.safetensors"
    source.parent.mkdir()
    for suffix in (".safetensors", ".json"):
        shutil.copy(tiny_model.with_suffix(suffix), source.with_suffix(suffix))
    length = ("start.freeze_backbone=5steps", "start.ramp=4steps", "trainer.max_steps=16", *LIVELY, *more)
    whole = pretrain(config(source, *length, "run.name=whole"))
    with stop_at(stop):
        parts = pretrain(config(source, *length, "run.name=parts"))
    shutil.rmtree(source.parent)
    pretrain(config(source, *length, "run.name=parts", "run.resume=true"))
    assert_same_run(whole, parts)


def test_resume_refuses_another_checkpoint(tiny_model, run, config, stop_at):
    with stop_at(2):
        pretrain(config(tiny_model))
    with pytest.raises(UserError, match=r"checkpoint: .* -> "):
        pretrain(config(run, "run.resume=true"))


# --- evaluated ---------------------------------------------------------------------------------------------------


def test_evaluations_show_the_start_weights_and_the_paired_difference(tiny_model, config, sample, capsys):
    path = pretrain(config(tiny_model, "start.freeze_backbone=0%", "start.backbone_lr=1e-2", "trainer.max_steps=12"))
    for task in ("knn", "linear"):
        out = path / f"{task}.json"
        assert main([task, f"checkpoint={path}", f"data.root={sample}", f"out={out}"]) == 0
        result = json.loads(out.read_text())
        assert result["baselines"][0]["name"] == "start weights"
        for change in result["changes"]:
            scores = (result["baselines"][0], result["score"])
            before, after = (
                next(metric["value"] for metric in score["metrics"] if metric["name"] == change["metric"])
                for score in scores
            )
            assert (change["before"], change["after"]) == pytest.approx((before, after))
            assert change["low"] <= after - before <= change["high"]
        assert len(result["changes"]) >= 1
        assert "since the start weights: from" in capsys.readouterr().out
    images = (f"images={sample / 'test'}", f"masks={sample / 'test_masks'}", "limit=12", f"out={path / 'attention'}")
    assert main(["attention", f"checkpoint={path}", *images]) == 0
    assert "IoU of mass/mean since the start weights: from" in capsys.readouterr().out
    result = json.loads((path / "attention" / "summary.json").read_text())
    with np.load(path / "attention" / "ious.npz") as ious:
        for change in result["changes"]:
            metric = change["metric"].removeprefix("IoU of ")
            before, after = (ious[f"{name}/{metric}"] for name in ("start weights", "model"))
            assert (change["before"], change["after"]) == pytest.approx((before.mean(), after.mean()))
            expected = scipy.stats.ttest_rel(after, before)
            assert change["p"] == pytest.approx(expected.pvalue, rel=1e-4)
            low, high = expected.confidence_interval()
            assert (change["low"], change["high"]) == pytest.approx((low, high), rel=1e-4)
    plain = path / "plain.json"
    assert main(["knn", f"checkpoint={tiny_model}", f"data.root={sample}", f"out={plain}"]) == 0
    assert not json.loads(plain.read_text())["changes"]
