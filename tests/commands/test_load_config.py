"""load_config: precedence of overrides, error messages, and values that are taken literally."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from ssl_vit.cli import COMMANDS
from ssl_vit.cli import main as ssl_vit
from ssl_vit.commands.load_config import compose_config, load_config, positional_key, string_keys
from ssl_vit.config.evaluate import CompareConfig, KNNConfig
from ssl_vit.config.methods import METHOD_CONFIGS, DINOConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.runtime.errors import UserError
from tests.helpers.cli import load


def error_of(command, *overrides):
    """The text that the user sees."""
    with pytest.raises(UserError) as caught:
        load(command, *overrides)
    return str(caught.value)


# --- precedence ---


def test_load_config_prefers_overrides_to_recipes_to_groups(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /method: sit\n  - override /backbone: vit_cpu\nseed: 7\n"
        "data: {batch_size: 32}\n"
    )
    mine = ["recipe=mine", f"--config-dir={tmp_path}"]
    config = load("pretrain", *mine)
    assert (config.method.name, config.backbone.embed_dim, config.seed, config.data.batch_size) == ("sit", 128, 7, 32)
    assert load("pretrain", *mine, "seed=8").seed == 8


def test_load_config_parses_typed_values():
    config = load(
        "pretrain", "method.views.global_crops.scale=[0.2,1]", "data.num_workers=auto", "trainer.max_steps=null"
    )
    assert config.method.views.global_crops.scale == (0.2, 1.0)
    assert config.data.num_workers == "auto"
    assert config.trainer.max_steps is None
    assert load("pretrain", "run.name=2024").run.name == "2024"
    assert load("pretrain", "method=sit").run.name == "sit"
    assert load("pretrain", "backbone.img_size=64").method.views.global_crops.size == 64


# --- messages ---


def test_load_config_explains_keys_of_other_tools_and_proposes_similar_keys_only():
    for key in ("checkpoint", "pretrained", "backbone.pretrained", "weights"):
        assert f"{key}: unknown key; this command loads no weights" in error_of("bench", f"{key}=true")
    for key in ("pretrained", "backbone.pretrained"):
        expected = f"{key}: unknown key; weights to load are named by checkpoint="
        assert expected in error_of("pretrain", "data.root=x", f"{key}=true")
    assert "resume_from: unknown key; a run is resumed with run.resume=true" in error_of(
        "pretrain", "data.root=x", "resume_from=y"
    )
    assert "zzqq: unknown key; --help lists all keys" in error_of("pretrain", "data.root=x", "zzqq=1")


def test_load_config_refuses_a_name_that_promises_trained_weights():
    text = error_of("pretrain", "data.root=x", "backbone.name=vit_small_patch14_dinov2.lvd142m")
    assert "the tag lvd142m stands for trained weights" in text
    assert "write backbone.name=vit_small_patch14_dinov2" in text


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ([], []),
        (["backbone.name=vit_small_patch8_224"], ["patch_size=16 instead of 8"]),
        (["backbone.name=vit_small_patch16_224", "backbone.img_size=96"], ["img_size=96 instead of 224"]),
        (["backbone.name=vit_small_patch14_reg4_dinov2", "backbone.depth=2"],
         ["patch_size=16 instead of 14", "reg_tokens=0 instead of 4", "depth=2"]),
    ],
)  # fmt: skip
def test_backbone_config_overridden_names_what_the_name_does_not_say(argv, changed):
    assert load("pretrain", "data.root=x", *argv).backbone.overridden() == changed


def test_load_config_lists_all_mistakes_with_the_nearest_keys():
    text = error_of(
        "pretrain", "sede=1", "data.bach_size=2", "lr=0.1", "method.head.layers=many", "trainer.max_epochs=0"
    )
    assert "5 mistakes" in text
    assert "sede: unknown key; the nearest valid one is seed" in text
    assert "data.bach_size: unknown key; the nearest valid one is data.batch_size" in text
    assert "lr: unknown key; the nearest valid one is method.optimizer.lr" in text
    assert re.search(r"method\.head\.layers: .*integer.*'many'", text)
    assert re.search(r"trainer\.max_epochs: .*greater than or equal to 1 \(got 0\)", text)


class ToyConfig(DINOConfig):
    name: Literal["toy"]
    mask_ratio: Annotated[float, Field(gt=0, lt=1)]
    targets: str


def test_load_config_names_keys_of_any_method_as_the_user_writes_them(tmp_path, monkeypatch):
    monkeypatch.setitem(METHOD_CONFIGS, "toy", ToyConfig)
    string_keys.cache_clear()
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "toy.yaml").write_text(
        "defaults: [dino, _self_]\nname: toy\nmask_ratio: 0.5\ntargets: pixels\n"
    )
    toy = ["method=toy", f"--config-dir={tmp_path}"]
    assert load("pretrain", *toy, "method.targets=1e3").method.targets == "1e3"
    text = error_of("pretrain", *toy, "method.mask_ration=.5", "method.head.layers=0")
    assert "method.mask_ration: unknown key; the nearest valid one is method.mask_ratio\n" in f"{text}\n"
    assert "method.head.layers: input should be greater" in text
    string_keys.cache_clear()


def test_load_config_finds_unknown_keys_in_own_files(tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "mine.yaml").write_text("defaults: [vit_tiny]\npatchsize: 8\n")
    text = error_of("pretrain", "backbone=mine", f"--config-dir={tmp_path}")
    assert "backbone.patchsize: unknown key; the nearest valid one is backbone.patch_size" in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.root=null"], ["data.root: is required: write data.root=..."]),
        (["backbone=vit_smal"], ["backbone=vit_smal", "vit_base, vit_cpu, vit_large, vit_small, vit_tiny"]),
        (["method=byol"], ["method=byol", "dino, sit"]),
        (["method.name=byol"], ["method.name='byol': choose one of dino, sit"]),
        (["method=dino,sit"], ["'method=dino,sit'", "method=NAME"]),
        (["recipe=nope"], ["recipe=nope", "there is no such option"]),
        (["--config-dir=nowhere"], ["--config-dir=nowhere: there is no such folder"]),
        ([f"--config-dir={'x' * 300}"], ["there is no such folder"]),
        (["seed"], ["'seed': expected key=value"]),
        (["a b=1"], ["'a b=1': expected key=value"]),
        (["=1"], ["expected key=value"]),
        (["method=sit", "method.head.layers=3"], ["method.head: unknown key"]),
        (["method.views.global_crops.scale=[1,0.4]"], ["method.views.global_crops.scale", "[0.4, 1.0]"]),
        (["method.views.global_crops.count=3"], ["method: views.global_crops.count must be 2"]),
        (["method.views.local_crops.size=50"], ["local_crops.size=50", "patch_size=16"]),
        (
            ["data.batch_size=65", "trainer.accumulate_grad_batches=2"],
            ["data.batch_size=65", "accumulate_grad_batches = 2"],
        ),
        (
            ["method=sit", "data.batch_size=60", "trainer.devices=2", "trainer.accumulate_grad_batches=3"],
            ["data.batch_size=60 means 10 images per process", "multiple of 4", "data.batch_size=72"],
        ),
        (["backbone.in_chans=1"], ["backbone.in_chans=1", "method.views.mean"]),
        (["backbone.img_size=100"], ["img_size 100 is not a multiple of patch_size 16"]),
        (["trainer.max_time=soon"], ["trainer.max_time: write a time as 90s, 20m, 1.5h or 2d"]),
        (["method.optimizer.warmup=soon"], ["method.optimizer.warmup: write a duration as 100steps"]),
        (["run.resume=true", "run.overwrite=true"], ["run: resume and overwrite exclude each other"]),
        (["run.name=a/b"], ["run.name"]),
        (
            ["method=sit", *(f"method.{part}.enabled=false" for part in ("rotation", "contrastive", "reconstruction"))],
            ["enable at least one of rotation, contrastive, reconstruction"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_load_config_message_has_no_traceback_or_library_name(overrides, expected):
    text = error_of("pretrain", *overrides)
    assert all(part in text for part in expected), text
    assert not re.search(r"Traceback|hydra|pydantic|HYDRA|omegaconf", text)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "name the labeled images: data.root=FOLDER"),
        (["data.test=x"], "name the labeled images: data.root=FOLDER, or data.train=FOLDER data.test=FOLDER"),
        (["data.root=x", "data.train=y"], "data.root and data.train exclude each other"),
        (["data.root=x", "k=[]"], "k: "),
        (["data.root=x", "k=[10,0]"], "k.1: "),
        (["data.root=x", "k=[10"], "k.0: "),
    ],
)
def test_load_config_message_of_an_evaluation(overrides, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        load_config("knn", ["checkpoint=x", *overrides], KNNConfig)


# --- literal values ---


@pytest.mark.parametrize(
    "path",
    [
        "my images", "a,b", "[old]", "photos[1]", "{a: 1}", "epoch=3-step=100.ckpt", "bilder/äöü 写真", "it's", 'a"b',
        "C:\\data\\x", "C:\\data\\", "back\\'quote", "~/x", "x$y", "100", "007", "1e3", "true", "100%", "a:b", "(1)",
        "*", "a#b", " spaces ", "-x", "@x", "a;b", "!x", "..",
    ],
)  # fmt: skip
def test_load_config_takes_paths_and_names_literally(path):
    assert load("pretrain", f"data.root={path}").data.root == Path(path)
    assert load("export", f"checkpoint={path}").checkpoint == path


@pytest.mark.parametrize("command", COMMANDS)
def test_string_keys_alone_keep_digits_as_text(command):
    config_class = COMMANDS[command].config_class()
    keys = flatten(compose_config(command, [], config_class))
    values = flatten(compose_config(command, [f"{key}=12" for key in keys], config_class))
    assert {key for key, value in values.items() if value == "12"} == string_keys(config_class)
    assert {"checkpoint", "data.root", "run.name", "out", "images"} & keys.keys() <= string_keys(config_class)


def flatten(values, prefix=""):
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_positional_key_takes_arguments_without_an_equals_sign(tmp_path):
    assert positional_key(CompareConfig) == "results"
    assert positional_key(KNNConfig) is None
    file = tmp_path / "a=b.json"
    file.touch()
    config = load_config("compare", ["runs/x", str(file), "mix=true"], CompareConfig)
    assert (config.results, config.mix) == ([Path("runs/x"), file], True)
    assert load_config("compare", ["results=[runs/x,7]"], CompareConfig).results == [Path("runs/x"), Path("7")]


def test_main_with_cfg_prints_the_composed_config(capsys):
    overrides = ["data.root=x", "backbone=vit_cpu"]
    assert ssl_vit(["pretrain", *overrides, "--cfg"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == compose_config("pretrain", overrides, PretrainConfig)
    assert printed["backbone"]["embed_dim"] == 128


@pytest.mark.parametrize("override", ["+hydra=[1,2]", "hydra=x", "+hydra@a=x", "hydra.run.dir=x"])
def test_load_config_of_an_option_of_hydra_names_multirun(override):
    assert "--multirun" in error_of("pretrain", override)


@pytest.mark.parametrize(
    ("environment", "words", "expected"),
    [
        ({}, [], (1, 1)),
        ({}, ["trainer.devices=2"], (2, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, [], (2, 1)),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, [], (4, 2)),
        (
            {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            ["trainer.devices=4", "trainer.num_nodes=2"],
            (4, 2),
        ),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}, [], (2, 2)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "bash"}, ["trainer.devices=2"], (2, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ["trainer.devices=1"], None),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ["trainer.num_nodes=2"], None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, ["trainer.devices=2"], None),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}, ["trainer.devices=2"], None),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_load_config_takes_the_processes_of_the_launcher(monkeypatch, environment, words, expected, command):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(UserError, match=r"but the launcher started \d x \d processes"):
            load(command, *words)
    else:
        trainer = load(command, *words).trainer
        assert (trainer.devices, trainer.num_nodes) == expected
