"""The configuration: everything shipped validates, mistakes are told all at once, words are taken as they are meant."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from ssl_vit.cli import COMMANDS
from ssl_vit.cli import main as ssl_vit
from ssl_vit.commands.config_dirs import conf_dir, recipes_dir
from ssl_vit.commands.load_config import STRING_KEYS, compose_config, load_config, to_yaml
from ssl_vit.config import evaluate as evaluations
from ssl_vit.config import methods
from ssl_vit.config import pretrain as models
from ssl_vit.config import visualize as dataset
from ssl_vit.runtime.errors import UserError

# Per command its model and the keys that have no default.
NEEDED = {
    "demo": (models.DemoConfig, []),
    "pretrain": (models.PretrainConfig, ["data.root=images"]),
    "knn": (evaluations.KNNConfig, ["checkpoint=runs/x", "data.root=labeled"]),
    "linear": (evaluations.LinearConfig, ["checkpoint=runs/x", "data.root=labeled"]),
    "compare": (evaluations.CompareConfig, ["runs/x"]),
    "neighbors": (evaluations.NeighborsConfig, ["checkpoint=runs/x", "data.root=images"]),
    "features": (evaluations.FeaturesConfig, ["checkpoint=runs/x", "data.root=labeled"]),
    "fewshot": (evaluations.FewshotConfig, ["checkpoint=runs/x", "data.root=labeled"]),
    "transfer": (evaluations.TransferConfig, ["checkpoints=[runs/x]", "data.roots=[labeled]"]),
    "finetune": (evaluations.FinetuneConfig, ["checkpoint=runs/x", "data.root=labeled"]),
    "attention": (dataset.AttentionConfig, ["checkpoint=runs/x", "images=images"]),
    "video": (dataset.VideoConfig, ["checkpoint=runs/x", "video=clip.mp4"]),
    "propagate": (dataset.PropagateConfig, ["checkpoint=runs/x", "davis=DAVIS"]),
    "inspect": (dataset.InspectConfig, ["checkpoint=runs/x"]),
    "report": (dataset.ReportConfig, ["run=runs/x"]),
    "export": (models.ExportConfig, ["checkpoint=runs/x"]),
    "scan": (models.ScanConfig, ["data.root=images"]),
    "bench": (models.BenchConfig, []),
    "shard": (models.ShardConfig, ["data.root=images"]),
}
OPTIONS = sorted(f"{file.parent.name}={file.stem}" for file in conf_dir().glob("*/*.yaml"))
RECIPES = sorted(recipes_dir().glob("*.yaml"))
SECTIONS = [
    model
    for module in (models, methods, evaluations, dataset)
    for model in vars(module).values()
    if isinstance(model, type) and issubclass(model, models.StrictConfig)
]


def load(command, *words):
    model, needed = NEEDED[command]
    return load_config(command, [*needed, *words], model)


def mistakes(command, *words):
    """The text that the user sees."""
    with pytest.raises(UserError) as caught:
        load(command, *words)
    return str(caught.value)


# --- what is shipped ---


def test_every_command_has_its_configuration():
    assert NEEDED.keys() == COMMANDS.keys()
    assert {file.stem for file in conf_dir().glob("*.yaml")} == COMMANDS.keys()


@pytest.mark.parametrize("command", NEEDED)
def test_defaults_validate(command):
    load(command)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_group_option_validates(option):
    load("knn" if option.startswith("labeled=") else "pretrain", option)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_validates_and_says_what_it_reaches(recipe):
    lines = recipe.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    head = dict(re.findall(r"^# (Command|Hardware|Result): +(.+)$", recipe.read_text(encoding="utf-8"), flags=re.M))
    assert head.keys() == {"Command", "Hardware", "Result"}
    program, command, *words = shlex.split(head["Command"])
    assert program == "ssl-vit"
    load_config(command, words, NEEDED[command][0])
    load("finetune" if command == "finetune" else "pretrain", f"recipe={recipe.stem}")


def test_recipes_win_over_the_groups_and_words_over_recipes(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /method: sit\n  - override /backbone: vit_cpu\nseed: 7\n"
        "data: {batch_size: 32}\n"
    )
    mine = ["recipe=mine", f"--config-dir={tmp_path}"]
    config = load("pretrain", *mine)
    assert (config.method.name, config.backbone.embed_dim, config.seed, config.data.batch_size) == ("sit", 128, 7, 32)
    assert load("pretrain", *mine, "seed=8").seed == 8


@pytest.mark.parametrize("file", sorted(conf_dir().rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_key_has_a_comment(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    unexplained = [line for line in lines if re.match(r" *\w+: *[^ #]", line) and " # " not in line]
    assert not unexplained


@pytest.mark.parametrize("model", SECTIONS, ids=lambda model: model.__name__)
def test_defaults_stand_in_conf_only(model):
    with_default = [name for name, field in model.model_fields.items() if not field.is_required()]
    assert not with_default


def test_texts_are_exactly_the_keys_of_names_and_paths():
    def texts(model, prefix=""):
        for name, field in model.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, models.StrictConfig):
                yield from texts(annotation, f"{prefix}{name}.")
            elif annotation in (str, Path, str | None, Path | None, list[str]):
                yield f"{prefix}{name}"

    assert {key for model, _ in NEEDED.values() for key in texts(model)} == STRING_KEYS


# --- round trip ---


@pytest.mark.parametrize(
    "words", ["", "method=sit", "trainer.max_time=1.5h method.teacher.warmup=2.5epochs", "backbone=vit_cpu"]
)
def test_what_a_run_writes_down_reads_back_equal(words):
    config = load("pretrain", *words.split())
    text = to_yaml(config.model_dump(mode="json"))
    assert type(config).model_validate(yaml.safe_load(text)) == config


@pytest.mark.parametrize(
    "words",
    ["", "trainer.devices=2 method.corruption.replace.p=0", "trainer.devices=3", "method=dino trainer.devices=2"],
)
def test_only_images_that_lend_each_other_blocks_come_in_fours(words):
    batch_size = 60 if "3" in words else 30
    assert (
        load("pretrain", "method=sit", f"data.batch_size={batch_size}", *words.split()).trainer.accumulate_grad_batches
        == 1
    )


def test_times_and_durations_are_written_as_they_are_read():
    written = load("pretrain", "trainer.max_time=1.5h", "method.freeze_last_layer=5%").model_dump(mode="json")
    assert written["trainer"]["max_time"] == "5400s"
    assert written["method"]["freeze_last_layer"] == "5%"


# --- mistakes ---


def test_all_mistakes_at_once_with_the_nearest_keys():
    text = mistakes(
        "pretrain", "sede=1", "data.bach_size=2", "lr=0.1", "method.head.layers=many", "trainer.max_epochs=0"
    )
    assert "5 mistakes" in text
    assert "sede: unknown key; the nearest valid one is seed" in text
    assert "data.bach_size: unknown key; the nearest valid one is data.batch_size" in text
    assert "lr: unknown key; the nearest valid one is method.optimizer.lr" in text
    assert re.search(r"method\.head\.layers: .*integer.*'many'", text)
    assert re.search(r"trainer\.max_epochs: .*greater than or equal to 1 \(got 0\)", text)


def test_unknown_keys_in_an_own_file_are_found_too(tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "mine.yaml").write_text("defaults: [vit_tiny]\npatchsize: 8\n")
    text = mistakes("pretrain", "backbone=mine", f"--config-dir={tmp_path}")
    assert "backbone.patchsize: unknown key; the nearest valid one is backbone.patch_size" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.root=null"], ["data.root: is needed: write data.root=..."]),
        (["backbone=vit_smal"], ["backbone=vit_smal", "vit_base, vit_cpu, vit_large, vit_small, vit_tiny"]),
        (["method=byol"], ["method=byol", "dino, sit"]),
        (["method=dino,sit"], ["'method=dino,sit'", "method=NAME"]),
        (["recipe=nope"], ["recipe=nope", "there is no such option"]),
        (["--config-dir=nowhere"], ["--config-dir=nowhere: there is no such folder"]),
        (["seed"], ["'seed': expected key=value"]),
        (["a b=1"], ["'a b=1': expected key=value"]),
        (["=1"], ["expected key=value"]),
        (["method=sit", "method.head.layers=3"], ["method.head: unknown key"]),
        (["method.views.global_crops.scale=[1,0.4]"], ["method.views.global_crops.scale", "[0.4, 1.0]"]),
        (["method.views.global_crops.count=3"], ["method: views.global_crops.count must be 2"]),
        (["method.views.local_crops.size=50"], ["local_crops.size=50", "patch_size=16"]),
        (["data.batch_size=65", "trainer.accumulate_grad_batches=2"], ["data.batch_size=65", "2 parts"]),
        (
            ["method=sit", "data.batch_size=60", "trainer.devices=2", "trainer.accumulate_grad_batches=3"],
            ["data.batch_size=60 makes 10 images per process", "multiple of 4", "data.batch_size=72"],
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
def test_a_mistake_says_what_where_and_what_to_do(words, told):
    text = mistakes("pretrain", *words)
    assert all(part in text for part in told), text
    assert not re.search(r"Traceback|hydra|pydantic|HYDRA|omegaconf", text)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name the labeled images: data.root=FOLDER"),
        (["data.test=x"], "name the labeled images: data.root=FOLDER, or data.train=FOLDER data.test=FOLDER"),
        (["data.root=x", "data.train=y"], "data.root and data.train exclude each other"),
        (["data.root=x", "k=[]"], "k: "),
        (["data.root=x", "k=[10,0]"], "k.1: "),
        (["data.root=x", "k=[10"], "k.0: "),
    ],
)
def test_mistakes_of_evaluation(words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load_config("knn", ["checkpoint=x", *words], evaluations.KNNConfig)


def test_exit_code_is_2_and_there_is_no_traceback(capsys):
    assert ssl_vit(["pretrain", "data.root=x", "sede=1"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ssl-vit pretrain: 1 mistake in the configuration\n  sede: unknown key")
    assert "Traceback" not in out + err


# --- words are taken as they are meant ---


@pytest.mark.parametrize(
    "path",
    [
        "my images", "a,b", "[old]", "photos[1]", "{a: 1}", "epoch=3-step=100.ckpt", "bilder/äöü 写真", "it's", 'a"b',
        "C:\\data\\x", "C:\\data\\", "back\\'quote", "~/x", "x$y", "100", "007", "1e3", "true", "100%", "a:b", "(1)",
        "*", "a#b", " spaces ", "-x", "@x", "a;b", "!x", "..",
    ],
)  # fmt: skip
def test_paths_and_names_are_taken_literally(path):
    assert load("pretrain", f"data.root={path}").data.root == Path(path)
    assert load_config("export", [f"checkpoint={path}"], models.ExportConfig).checkpoint == path


def test_typed_words():
    config = load(
        "pretrain", "method.views.global_crops.scale=[0.2,1]", "data.num_workers=auto", "trainer.max_steps=null"
    )
    assert config.method.views.global_crops.scale == (0.2, 1.0)
    assert config.data.num_workers == "auto"
    assert config.trainer.max_steps is None
    assert load("pretrain", "run.name=2024").run.name == "2024"
    assert load("pretrain", "method=sit").run.name == "sit"
    assert load("pretrain", "backbone.img_size=64").method.views.global_crops.size == 64


def test_cfg_prints_what_composes(capsys):
    assert ssl_vit(["pretrain", "data.root=x", "backbone=vit_cpu", "--cfg"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == compose_config("pretrain", ["data.root=x", "backbone=vit_cpu"])
    assert printed["backbone"]["embed_dim"] == 128


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("[]", []),
        ("[a=1,b=2]", ["a=1", "b=2"]),
        ("method.teacher.momentum=[0.9,1.0]", ["method.teacher.momentum=[0.9,1.0]"]),
        ("[a=[[1,2],[3,4]], b=c]", ["a=[[1,2],[3,4]]", "b=c"]),
    ],
)
def test_overrides_to_compare_with_may_hold_lists(written, words):
    assert load_config("bench", [f"compare_to={written}"], models.BenchConfig).compare_to == words
