"""The text of `ssl-vit <command> --help`, made of the commented files in `conf/`; without Hydra, pydantic or torch."""

from __future__ import annotations

import re
from pathlib import Path

from ssl_vit.runtime.shipped_files import conf_dir, recipes_dir

_PACKAGE = re.compile(r"\A# @package (\w+)\n")
_GROUP = re.compile(r"  - (?:override /)?(\w+)(?:: (\w+))?$")


def help_text(command: str, summary: str, example: str, overrides: list[str]) -> str:
    """Return the summary, the example, and every key with its default and comment.

    Where `overrides` select group options, their keys are shown instead of the default ones.
    """
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    own, groups = _read(conf_dir() / f"{command}.yaml")
    lines = [f"ssl-vit {command}: {summary}", "", f"  $ {example}", "", "Keys, with their defaults:", "", own.strip()]
    for group, default in groups.items():
        if group == "recipes":
            continue
        option = chosen.get(group, default)
        file = conf_dir() / group / f"{option}.yaml"
        others = ", ".join(sorted(other.stem for other in file.parent.glob("*.yaml") if other != file))
        section, title = _section(file), f"   # {group}={option}" + (f"; also {others}" if others else "")
        everywhere = section == "_global_"  # its keys are those of several sections
        lines += ["", title.strip() if everywhere else f"{section}:{title}"]
        lines += [("" if everywhere else "  ") + line for line in _keys_of(file).strip().splitlines()]
    if "recipes" in groups:
        names = ", ".join(sorted(file.stem for file in recipes_dir().glob("*.yaml")))
        lines += ["", f"recipe=NAME uses the settings of a recipe: {names}"]
    lines += [
        "",
        "Quote lists: 'key=[1,2]'. --cfg prints the composed configuration and exits.",
        "--config-dir=FOLDER adds your own files, FOLDER/<group>/<option>.yaml.",
    ]
    if command == "pretrain":
        lines.append("--multirun starts a run for every combination of values: seed=0,1,2 'run.name=photos-${seed}'.")
    return "\n".join(lines)


def _read(file: Path) -> tuple[str, dict[str, str]]:
    """Return the file's text without its defaults list, and that list as group -> option."""
    text = _PACKAGE.sub("", file.read_text(encoding="utf-8"))
    head, _, body = text.partition("defaults:\n")
    if not body:
        return text, {}
    lines = body.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("  - ")), len(lines))
    matches = [match for line in lines[:end] if (match := _GROUP.match(line)) and match[1] != "self_"]
    return head + "\n".join(lines[end:]), {match[1]: match[2] or "" for match in matches if match[1] != "_self_"}


def _keys_of(file: Path) -> str:
    """Return the keys of a group option, after those that it inherits and does not override."""
    own, bases = _read(file)
    keys = set(re.findall(r"^(\w+):", own, flags=re.M))
    inherited = [line for base in bases for line in _keys_of(file.with_name(f"{base}.yaml")).splitlines()]
    return "\n".join([*(line for line in inherited if line.partition(":")[0] not in keys), own.strip()])


def _section(file: Path) -> str:
    """Return the section of the file's keys: its folder's name unless its first line names another."""
    package = _PACKAGE.match(file.read_text(encoding="utf-8"))
    return package[1] if package else file.parent.name
