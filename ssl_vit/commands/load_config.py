"""Compose and validate the configuration of a command: Hydra composes, pydantic validates.

Uses Hydra's compose API, so that nothing of a Hydra application (log files, output folders, traces) comes along and
`sys.argv` stays as the user typed it, for the processes that Lightning starts.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Set
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ssl_vit.config.methods import METHOD_CONFIGS, MethodConfig
from ssl_vit.config.types import POSITIONAL, StrictConfig
from ssl_vit.runtime.errors import AllRanksError, UserError
from ssl_vit.runtime.launch import launched_processes
from ssl_vit.runtime.shipped_files import conf_dir, recipes_dir
from ssl_vit.runtime.yaml_file import read_yaml

ConfigT = TypeVar("ConfigT", bound=StrictConfig)

_LEAST_SIMILARITY = 1.0  # of a key that is proposed, see `key_similarity`
_WEIGHTS_KEYS = ("checkpoint", "pretrained", "weights")  # of other tools
_RESUME_KEYS = ("resume", "resume_from", "resume_from_checkpoint", "ckpt_path")


def load_config(command: str, argv: list[str], config_class: type[ConfigT]) -> ConfigT:
    """Compose `conf/<command>.yaml` with the overrides `argv` and validate it.

    Raises:
        AllRanksError: Lists every unknown key, wrong type and value out of range at once.
    """
    try:
        values = compose_config(command, argv, config_class)
        if "start" in values and values["checkpoint"] is not None:
            from ssl_vit.commands.start_overrides import start_overrides

            before = start_overrides(values, argv, conf_dir() / "start")
            values = compose_config(command, [*before, *argv], config_class)
        _set_processes(values.get("trainer"))
        return config_class.model_validate(values)
    except ValidationError as error:
        raise AllRanksError(_describe(error, values)) from None
    except UserError as error:  # all processes read the same command line
        raise AllRanksError(str(error)) from None


def compose_config(command: str, argv: list[str], config_class: type[StrictConfig]) -> dict[str, Any]:
    """Return the composed configuration as plain containers, not validated.

    Raises:
        UserError: An override cannot be read, or names a group option that does not exist.
    """
    positional = positional_key(config_class)
    arguments = [arg for arg in argv if positional and ("=" not in arg or os.path.exists(arg))]  # noqa: PTH110 - likewise
    argv, config_dirs = _split_config_dirs([arg for arg in argv if arg not in arguments])
    folders = [conf_dir(), recipes_dir().parent, *config_dirs]
    _check_yaml_files(config_dirs)
    search = ",".join(f"file://{folder.absolute()}" for folder in folders)
    home = next((folder for folder in folders if (folder / f"{command}.yaml").is_file()), conf_dir()).absolute()
    groups, strings = _groups(home / f"{command}.yaml"), string_keys(config_class)
    # Hydra takes the name of any group for a choice; in a command without this group it is a plain key.
    plain = {folder.name for folder in conf_dir().iterdir() if folder.is_dir()} - groups
    own = dict(arg.lstrip("+").split("=", 1) for arg in argv if _key(arg) in plain and "=" in arg)
    overrides = [to_hydra_override(arg, groups, strings) for arg in argv if _key(arg) not in own]
    try:
        with initialize_config_dir(str(home), version_base="1.3"):
            config = compose(command, [f"hydra.searchpath=[{search}]", *overrides])
            values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
            return values | own | ({positional: arguments} if arguments and positional else {})
    except MissingConfigException as error:
        raise UserError(_missing_option(error)) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(_without_hints(error)) from None
    except (OSError, ValueError, RecursionError) as error:  # files that are not YAML, names that are too long
        given = ", ".join(arg[:80] for arg in argv)
        raise UserError(f"cannot compose a configuration from {given}: {_without_hints(error)}") from None


def _set_processes(trainer: object) -> None:
    """Replace `auto` in trainer.devices and trainer.num_nodes by what a launcher such as torchrun started, else by 1.

    Raises:
        UserError: They are given, and contradict the launcher: each of its processes would train for itself.
    """
    if not isinstance(trainer, dict):
        return
    launched = launched_processes()
    for key, count in zip(("devices", "num_nodes"), launched or (1, 1), strict=True):
        if trainer.get(key) == "auto":
            trainer[key] = count
    given = trainer.get("devices"), trainer.get("num_nodes")
    if launched and all(isinstance(count, int) for count in given) and given != launched:
        raise UserError(
            f"trainer.devices={given[0]} and trainer.num_nodes={given[1]}, but the launcher started "
            f"{launched[0]} x {launched[1]} processes (per machine x machines). Leave both keys out, or set "
            f"trainer.devices={launched[0]} trainer.num_nodes={launched[1]}"
        )


def to_yaml(values: dict[str, Any]) -> str:
    """Return a configuration as YAML text, as in `config.yaml` of a run."""
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


# --- the keys of a config class ----------------------------------------------------------------------------------


@cache
def string_keys(config_class: type[StrictConfig]) -> frozenset[str]:
    """Return the keys that hold names, paths or lists of them: `run.name=2024` is text, and so is a folder `[old]`."""
    return frozenset(key for key, field in _fields(config_class) if _is_string(field.annotation))


def positional_key(config_class: type[StrictConfig]) -> str | None:
    """Return the key that takes the arguments without an equals sign, if there is one."""
    return next((key for key, field in _fields(config_class) if POSITIONAL in field.metadata), None)


def _fields(config_class: type[StrictConfig], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key with its field; in the section `method`, the keys of every method."""
    for name, field in config_class.model_fields.items():
        yield f"{prefix}{name}", field
        sections = METHOD_CONFIGS.values() if field.annotation is MethodConfig else [field.annotation]
        for section in sections:
            if isinstance(section, type) and issubclass(section, StrictConfig):
                yield from _fields(section, f"{prefix}{name}.")


def _is_string(annotation: object) -> bool:
    types = set(get_args(annotation) or [annotation]) - {NoneType}
    return bool(types) and types <= {str, Path}


# --- overrides ---------------------------------------------------------------------------------------------------


def to_hydra_override(override: str, groups: set[str], strings: Set[str]) -> str:
    """Return a user's `key=value` as a Hydra override.

    Values of the keys in `strings`, and values that Hydra's grammar does not accept, are taken literally. Plain keys
    are forced in, so that an unknown one reaches the validation, which lists all of them with the nearest valid keys.
    """
    key, equals, value = override.partition("=")
    if re.match(r"[+~]*hydra([/.@]|$)", key):
        raise UserError(f"{override!r} is an option of a sweep: add --multirun")
    if not equals or not re.fullmatch(r"[+~]*[\w.@/]+", key):
        raise UserError(f"{override!r}: expected key=value (quote lists: 'key=[1,2]')")
    group = "recipes" if key == "recipe" else key.removesuffix("@_global_").lstrip("+~")
    if group in groups:
        if not re.fullmatch(r"[\w./-]+", value):
            raise UserError(f"{override!r}: expected one option, such as {key}=NAME")
        option = key if key.endswith("@_global_") else group
        return f"{option}='{value}'"  # quoted, or an option called 1 would be a number
    if key in strings and not value:  # `data.root=$UNSET` is not the current folder
        raise UserError(f"{override!r}: the value after the equals sign is missing")
    if not key.startswith(("+", "~")):
        key = f"++{key}"
    literal = key.lstrip("+") in strings and value != "null"
    try:
        readable = not literal and not OverridesParser.create().parse_override(f"{key}={value}").is_sweep_override()
    except HydraException:
        readable = False
    # A backslash is literal except before a quote, the closing one included.
    quoted = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value)
    return f"{key}={value}" if readable else f"{key}='{quoted}'"


def _split_config_dirs(argv: list[str]) -> tuple[list[str], list[Path]]:
    """Split off the folders of `--config-dir=FOLDER`, which hold the user's own recipes and group options."""
    folders = [Path(arg.partition("=")[2]) for arg in argv if arg.startswith("--config-dir=")]
    for folder in folders:
        if not os.path.isdir(folder):  # noqa: PTH112 - unlike `is_dir`, without an error for names that are too long
            raise UserError(f"--config-dir={folder}: there is no such folder")
    return [arg for arg in argv if not arg.startswith("--config-dir=")], folders


def _check_yaml_files(folders: list[Path]) -> None:
    """Check the user's own recipes and options, which Hydra would expand without a limit."""
    for path in (path for folder in folders for path in folder.rglob("*.yaml")):
        try:
            read_yaml(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {str(error).partition(chr(10))[0][:200]}") from None


def _groups(file: Path) -> set[str]:
    """Return the groups in the defaults list of a command's YAML: for these, `key=value` selects a file."""
    entries = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    return {group for entry in entries if isinstance(entry, dict) for group in entry}


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


# --- messages ----------------------------------------------------------------------------------------------------


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    key = {"recipes": "recipe"}.get(group, group)
    return f"{key}={option}: there is no such option; choose one of {', '.join(error.options or [])}"


def _without_hints(error: Exception) -> str:
    """Return Hydra's message without its hints about tracebacks."""
    lines = [line for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return "\n".join(lines) or "a value cannot be read"


def _describe(error: ValidationError, values: dict[str, Any]) -> str:
    """Return one line per mistake: the dotted key, what is wrong, and for an unknown key the nearest valid one."""
    mistakes = [(".".join(map(str, mistake["loc"])), mistake) for mistake in error.errors(include_url=False)]
    unknown = {key for key, mistake in mistakes if mistake["type"] == "extra_forbidden"}
    valid = [key for key in _keys(values) if not any(f"{key}.".startswith(f"{other}.") for other in unknown)]
    lines = []
    for key, mistake in mistakes:
        message = mistake["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if key in unknown:
            message = f"unknown key{_explain_unknown(key, valid)}"
        elif mistake["input"] is None:
            message = f"is required: write {key}=..."
        elif not isinstance(mistake["input"], dict):
            message += f" (got {mistake['input']!r})"
        lines.append(f"{key}: {message}" if key else message)
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return "\n  ".join([f"{count} in the configuration", *lines])


def _explain_unknown(key: str, valid: list[str]) -> str:
    """Return what to write instead of an unknown key, if that is clear."""
    last = key.rpartition(".")[2]
    if last in _RESUME_KEYS and "run.resume" in valid:
        return "; a run is resumed with run.resume=true and its run.name"
    if last in (*_WEIGHTS_KEYS, *_RESUME_KEYS):
        if "checkpoint" in valid:
            return "; weights to load are named by checkpoint="
        return "; this command loads no weights: `ssl-vit pretrain` and the evaluations take checkpoint="
    nearest = max(valid, key=partial(key_similarity, key))
    if key_similarity(key, nearest) < _LEAST_SIMILARITY:
        return "; --help lists all keys"
    return f"; the nearest valid one is {nearest}"


def key_similarity(key: str, other: str) -> float:
    """Return how similar two dotted keys are, 0 to 2: the ratios of their last names and of the whole keys, summed."""
    names = key.rpartition(".")[2], other.rpartition(".")[2]
    return sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in (names, (key, other)))


def _keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key, sections included."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
