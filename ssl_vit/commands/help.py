"""The text of `ssl-vit <command> --help`: the commented configuration files themselves."""

from __future__ import annotations

import re
from pathlib import Path

from ssl_vit.commands.config_dirs import conf_dir, recipes_dir

_PACKAGE = re.compile(r"\A# @package (\w+)\n")
_GROUP = re.compile(r"  - (?:override /)?(\w+)(?:: (\w+))?$")


def help_text(command: str, summary: str, example: str, words: list[str]) -> str:
    """Summary, example, and every key with its default and its comment; `words` may choose group options."""
    chosen = dict(word.split("=", 1) for word in words if "=" in word)
    own, groups = _read(conf_dir() / f"{command}.yaml")
    lines = [f"ssl-vit {command}: {summary}", "", f"  $ {example}", "", "Keys, with their defaults:", "", own.strip()]
    for group, default in groups.items():
        if group == "recipes":
            continue
        option = chosen.get(group, default)
        file = conf_dir() / group / f"{option}.yaml"
        lines += ["", f"{_section(file)}:   # {group}={option}{_others(file)}"]
        lines += [f"  {line}".rstrip() for line in _keys_of(file).strip().splitlines()]
    if "recipes" in groups:
        names = ", ".join(sorted(file.stem for file in recipes_dir().glob("*.yaml")))
        lines += ["", f"recipe=NAME takes the settings of a recipe: {names}"]
    lines += [
        "",
        "Lists are written 'key=[1,2]', in quotes. --cfg prints the composed configuration and stops.",
        "--config-dir=FOLDER adds your own files, laid out as FOLDER/<group>/<option>.yaml.",
    ]
    if command == "pretrain":
        lines.append("--multirun makes a run of every combination: seed=0,1,2 'run.name=photos-${seed}'.")
    return "\n".join(lines)


def _read(file: Path) -> tuple[str, dict[str, str]]:
    """The file's text without its defaults list, and that list as group -> option."""
    text = _PACKAGE.sub("", file.read_text(encoding="utf-8"))
    head, _, body = text.partition("defaults:\n")
    if not body:
        return text, {}
    lines = body.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("  - ")), len(lines))
    matches = [match for line in lines[:end] if (match := _GROUP.match(line)) and match[1] != "self_"]
    return head + "\n".join(lines[end:]), {match[1]: match[2] or "" for match in matches if match[1] != "_self_"}


def _keys_of(file: Path) -> str:
    """A group option's keys; those of the option that it builds on come first, without those it changes."""
    own, bases = _read(file)
    keys = set(re.findall(r"^(\w+):", own, flags=re.M))
    inherited = [
        line
        for base in bases
        for line in _keys_of(file.parent / f"{base}.yaml").splitlines()
        if line.partition(":")[0] not in keys
    ]
    return "\n".join([*inherited, own.strip()])


def _others(file: Path) -> str:
    others = sorted(other.stem for other in file.parent.glob("*.yaml") if other != file)
    return f"; also {', '.join(others)}" if others else ""


def _section(file: Path) -> str:
    """The section that the file's keys belong to: its folder's name unless its first line names another."""
    package = _PACKAGE.match(file.read_text(encoding="utf-8"))
    return package[1] if package else file.parent.name
