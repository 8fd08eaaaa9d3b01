"""From the words of a command line to a validated configuration: Hydra composes, pydantic checks.

The only file that knows Hydra. It uses Hydra's compose API, so that nothing of a Hydra application (its log files,
output folders, traces) comes along and `sys.argv` stays as the user typed it, for the processes that Lightning starts.
"""

from __future__ import annotations

import difflib
import re
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from ssl_vit.commands.config_dirs import conf_dir, recipes_dir
from ssl_vit.config.evaluate import (
    CompareConfig,
    FeaturesConfig,
    FewshotConfig,
    FinetuneConfig,
    KNNConfig,
    LinearConfig,
    NeighborsConfig,
    TransferConfig,
)
from ssl_vit.config.pretrain import BenchConfig, DemoConfig, ExportConfig, PretrainConfig, ScanConfig, ShardConfig
from ssl_vit.config.types import StrictConfig
from ssl_vit.config.visualize import AttentionConfig, InspectConfig, PropagateConfig, ReportConfig, VideoConfig
from ssl_vit.runtime.errors import AllRanksError, UserError

ConfigT = TypeVar("ConfigT", bound=StrictConfig)

# What the configuration of each command is made of.
CONFIG_CLASSES: dict[str, type[StrictConfig]] = {
    "attention": AttentionConfig,
    "bench": BenchConfig,
    "compare": CompareConfig,
    "demo": DemoConfig,
    "export": ExportConfig,
    "features": FeaturesConfig,
    "fewshot": FewshotConfig,
    "finetune": FinetuneConfig,
    "inspect": InspectConfig,
    "knn": KNNConfig,
    "linear": LinearConfig,
    "neighbors": NeighborsConfig,
    "pretrain": PretrainConfig,
    "propagate": PropagateConfig,
    "report": ReportConfig,
    "scan": ScanConfig,
    "shard": ShardConfig,
    "transfer": TransferConfig,
    "video": VideoConfig,
}

# Names and paths, and lists of such: `run.name=2024` is a text, and so is a folder called [old].
STRING_KEYS = {
    "run.name", "run.folder", "data.root", "data.train", "data.test", "data.roots", "online.root", "image_logging.root", "run",
    "backbone.name", "logger.project", "checkpoint", "checkpoints", "features", "images", "masks", "out", "linear",
    "compare_to", "video", "davis", "voc", "split", "frames",
}  # fmt: skip

# The key of a command that takes the words without an equals sign, and those that are files or folders.
POSITIONAL_KEYS = {"compare": "results"}


def load_config(command: str, words: list[str], model: type[ConfigT]) -> ConfigT:
    """Compose `conf/<command>.yaml` with the overrides `words` and validate it.

    Raises:
        AllRanksError: Listing every unknown key, wrong type and value out of range at once.
    """
    try:
        values = compose_config(command, words)
        return model.model_validate(values)
    except ValidationError as error:
        raise AllRanksError(_describe(error, values)) from None
    except UserError as error:  # all processes read the same words
        raise AllRanksError(str(error)) from None


def compose_config(command: str, words: list[str]) -> dict[str, Any]:
    """The composed configuration as plain containers, not validated.

    Raises:
        UserError: An override cannot be read, or names a group option that does not exist.
    """
    named = [word for word in words if command in POSITIONAL_KEYS and ("=" not in word or Path(word).exists())]
    words, own_folders = _split_config_dirs([word for word in words if word not in named])
    search = ",".join(f"file://{folder.absolute()}" for folder in [recipes_dir().parent, *own_folders])
    groups = _groups(command)
    # Hydra takes the name of any group for a choice; where the command has no such group, it is a plain key.
    plain = {folder.name for folder in conf_dir().iterdir() if folder.is_dir()} - groups
    own = dict(word.lstrip("+").split("=", 1) for word in words if _key(word) in plain and "=" in word)
    overrides = [to_hydra_override(word, groups) for word in words if _key(word) not in own]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose(command, [f"hydra.searchpath=[{search}]", *overrides])
            values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
            return values | own | ({POSITIONAL_KEYS[command]: named} if named else {})
    except MissingConfigException as error:
        raise UserError(_no_such_option(error)) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(_plain(error)) from None
    except (OSError, ValueError, RecursionError) as error:  # of files that are no YAML, of names that are too long
        given = ", ".join(word[:80] for word in words)
        raise UserError(f"no configuration can be made of {given}: {_plain(error)}") from None


def to_yaml(values: dict[str, Any]) -> str:
    """A configuration as the YAML that `config.yaml` of a run holds."""
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _split_config_dirs(words: list[str]) -> tuple[list[str], list[Path]]:
    """Take `--config-dir=FOLDER` (own recipes and group options) out of the words."""
    folders = [Path(word.partition("=")[2]) for word in words if word.startswith("--config-dir=")]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--config-dir={folder}: there is no such folder")
    return [word for word in words if not word.startswith("--config-dir=")], folders


def _groups(command: str) -> set[str]:
    """The groups that the command's defaults list names: there `key=value` chooses a file."""
    text = (conf_dir() / f"{command}.yaml").read_text(encoding="utf-8")
    return {group for entry in yaml.safe_load(text).get("defaults", []) if isinstance(entry, dict) for group in entry}


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def to_hydra_override(word: str, groups: set[str]) -> str:
    """A user's `key=value` as a Hydra override.

    Texts, and values that Hydra's grammar does not take, are taken literally. Plain keys are forced in, so that an
    unknown one reaches the validation, which names all of them and the nearest valid keys.
    """
    key, equals, value = word.partition("=")
    if key.startswith(("hydra/", "hydra.")):
        raise UserError(f"{word!r} is for a sweep: add --multirun")
    if not equals or not re.fullmatch(r"[+~]*[\w.@/]+", key):
        raise UserError(f"{word!r}: expected key=value (a list is written 'key=[1,2]', in quotes)")
    group = "recipes" if key == "recipe" else key.lstrip("+~")
    if group in groups:
        if not re.fullmatch(r"[\w./-]+", value):
            raise UserError(f"{word!r}: expected one option, such as {key}=NAME")
        return f"{group}='{value}'"  # quoted, or an option called 1 were a number
    if key in STRING_KEYS and not value:  # `data.root=$UNSET` is not the current folder
        raise UserError(f"{word!r}: a value is missing after the equals sign")
    if not key.startswith(("+", "~")):
        key = f"++{key}"
    literal = key.lstrip("+") in STRING_KEYS and value != "null"
    try:
        readable = not literal and not OverridesParser.create().parse_override(f"{key}={value}").is_sweep_override()
    except HydraException:
        readable = False
    # Backslashes stand for themselves but before a quote, the closing one included.
    quoted = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value)
    return f"{key}={value}" if readable else f"{key}='{quoted}'"


def _no_such_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    key = {"recipes": "recipe"}.get(group, group)
    return f"{key}={option}: there is no such option; choose one of {', '.join(error.options or [])}"


def _plain(error: Exception) -> str:
    """Hydra's message without its hints about tracebacks."""
    lines = [line for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return "\n".join(lines) or "a value cannot be read"


def _describe(error: ValidationError, values: dict[str, Any]) -> str:
    """One line per mistake: the dotted key, what is wrong with it, and for an unknown key the nearest valid one."""
    mistakes = error.errors(include_url=False)
    unknown = {".".join(map(str, m["loc"])) for m in mistakes if m["type"] == "extra_forbidden"}
    known = [key for key in _keys(values) if not any(f"{key}.".startswith(f"{other}.") for other in unknown)]
    lines = []
    for mistake in mistakes:
        key = ".".join(map(str, mistake["loc"]))
        message = mistake["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if key in unknown:
            message = f"unknown key; the nearest valid one is {max(known, key=partial(key_similarity, key))}"
        elif mistake["input"] is None:
            message = f"is needed: write {key}=..."
        elif not isinstance(mistake["input"], dict):
            message += f" (got {mistake['input']!r})"
        lines.append(f"{key}: {message}" if key else message)
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return "\n  ".join([f"{count} in the configuration", *lines])


def key_similarity(key: str, other: str) -> float:
    """How near two dotted keys are, in their last names and as a whole."""
    names = key.rpartition(".")[2], other.rpartition(".")[2]
    return sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in (names, (key, other)))


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key, sections included."""
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{key}.")
    return keys
