"""The shipped configuration: every file in conf/ and recipes/ validates, and defaults stand nowhere else."""

import json
import re
import shlex

import pytest
import torch
import yaml

from ssl_vit.cli import COMMANDS
from ssl_vit.commands.load_config import load_config, to_yaml
from ssl_vit.config import evaluate, methods, pretrain, types, visualize
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.shipped_files import conf_dir, recipes_dir
from tests.helpers.cli import load

OPTIONS = sorted(f"{file.parent.name}={file.stem}" for file in conf_dir().glob("*/*.yaml"))
RECIPES = sorted(recipes_dir().glob("*.yaml"))
SECTIONS = {
    section
    for module in (methods, pretrain, evaluate, visualize)
    for section in vars(module).values()
    if isinstance(section, type) and issubclass(section, types.StrictConfig)
}


def test_conf_has_one_file_per_command():
    assert {file.stem for file in conf_dir().glob("*.yaml")} == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_conf_defaults_validate(command):
    load(command)


@pytest.mark.parametrize("option", OPTIONS)
def test_conf_group_options_validate(option):
    source = ["checkpoint=random:vit_tiny_patch16_224"] if option.startswith(("start=weights", "anchor=")) else []
    load("knn" if option.startswith("eval_data=") else "pretrain", option, *source)


@pytest.mark.parametrize("file", sorted(conf_dir().rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_conf_keys_have_comments(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.match(r" *\w+: *[^ #]", line) and " # " not in line]


@pytest.mark.parametrize("file", sorted(conf_dir().rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_conf_comments_are_aligned(file):
    """Comments of a file begin in one column, except behind values that are longer."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if re.match(r" *\w+:.* # ", line)]
    columns = [line.index("# ") for line in lines]
    assert all(column == min(columns) or line[column - 3] != " " for line, column in zip(lines, columns, strict=True))


@pytest.mark.parametrize("section", sorted(SECTIONS, key=str), ids=lambda section: section.__name__)
def test_config_classes_have_no_defaults(section):
    assert not [name for name, field in section.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_validates_and_names_its_command_and_result(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# @package _global_"
    head = dict(re.findall(r"^# (Command|Hardware|Result): +(.+)$", text, flags=re.M))
    assert head.keys() == {"Command", "Hardware", "Result"}
    program, command, *overrides = shlex.split(head["Command"])
    assert program == "ssl-vit"
    load_config(command, overrides, COMMANDS[command].config_class())
    load("finetune" if command == "finetune" else "pretrain", f"recipe={recipe.stem}")


WEIGHTS = sorted(recipes_dir().glob("weights/*.safetensors"))


@pytest.mark.parametrize("file", WEIGHTS, ids=lambda file: file.stem)
def test_weights_of_a_recipe_load_by_its_name_and_say_what_they_are(file):
    assert file.stat().st_size <= 4e6
    assert (recipes_dir() / f"{file.stem}.yaml").is_file()
    described = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    assert described["recipe"] == file.stem
    assert described["command"].startswith(f"ssl-vit pretrain recipe={file.stem} ")
    assert described["results"]
    loaded = load_backbone(f"recipe:{file.stem}")
    assert loaded.source == f"recipe:{file.stem}"
    assert all(parameter.dtype == torch.float32 for parameter in loaded.backbone.parameters())


def test_load_backbone_lists_the_recipes_with_weights():
    with pytest.raises(UserError, match=f"no such weights; there are .*recipe:{WEIGHTS[0].stem}"):
        load_backbone("recipe:none")


# --- what a run writes down ---


@pytest.mark.parametrize(
    "overrides", ["", "method=sit", "trainer.max_time=1.5h method.teacher.warmup=2.5epochs", "backbone=vit_cpu"]
)
def test_dump_config_reads_back_equal(overrides):
    config = load("pretrain", *overrides.split())
    text = to_yaml(config.model_dump(mode="json"))
    assert type(config).model_validate(yaml.safe_load(text)) == config


def test_dump_config_has_times_and_durations_as_text():
    dumped = load("pretrain", "trainer.max_time=1.5h", "method.freeze_last_layer=5%").model_dump(mode="json")
    assert dumped["trainer"]["max_time"] == "5400s"
    assert dumped["method"]["freeze_last_layer"] == "5%"


@pytest.mark.parametrize(
    ("batch_size", "overrides"),
    [
        (30, []),
        (30, ["trainer.devices=2", "method.corruption.replace.p=0"]),
        (60, ["trainer.devices=3"]),
        (30, ["method=dino", "trainer.devices=2"]),
    ],
)
def test_batch_size_is_a_multiple_of_4_only_where_processes_replace_blocks(batch_size, overrides):
    config = load("pretrain", "method=sit", f"data.batch_size={batch_size}", *overrides)
    assert config.data.batch_size == batch_size


@pytest.mark.parametrize(
    ("written", "items"),
    [
        ("[]", []),
        ("[a=1,b=2]", ["a=1", "b=2"]),
        ("method.teacher.momentum=[0.9,1.0]", ["method.teacher.momentum=[0.9,1.0]"]),
        ("[a=[[1,2],[3,4]], b=c]", ["a=[[1,2],[3,4]]", "b=c"]),
    ],
)
def test_split_overrides_splits_at_outer_commas(written, items):
    assert load("bench", f"compare_to={written}").compare_to == items
