"""Every command line in README.md and docs/ composes into a valid configuration; the paths in it need not exist."""

import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from ssl_vit import cli
from ssl_vit.commands.load_config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FLAGS = {"--help", "-h", "--cfg", "--version"}
PLACEHOLDER = "<command>"


class Documented(NamedTuple):
    """A command line of a page."""

    place: str  # page:line
    argv: list[str]  # behind `ssl-vit`
    in_block: bool  # of a code block, so that it should run as it stands


def documented_commands(text, page):
    """Find the command lines in code blocks and in inline code."""
    text = re.sub(r"<!--.*?-->", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```|(?<!`)`([^`]+)`(?!`)", text, flags=re.M | re.S):
        language, block, inline = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if inline is not None:
            yield from _parse(inline.replace("\n", " "), f"{page}:{line}", in_block=False)
        elif language in ("", "bash", "sh", "console"):
            joined = block.replace("\\\n", " ")
            for number, content in enumerate(joined.splitlines(), start=line + 1):
                yield from _parse(content.removeprefix("$ "), f"{page}:{number}", in_block=True)


def _parse(content, place, *, in_block):
    if not re.search(r"\bssl-vit\b|-m ssl_vit\b", content):
        return
    try:
        words = shlex.split(content, comments=in_block)
    except ValueError:  # prose with an apostrophe, in a block without a language
        return
    for index, word in enumerate(words):
        if word == "ssl-vit" or (word == "ssl_vit" and words[index - 1] == "-m"):
            yield Documented(place, words[index + 1 :], in_block)
            return


def expand(words):
    """Expand `--multirun` words, as seed=0,1,2, into one list of words for each run."""
    words = [word for word in words if word != "--multirun" and not word.startswith(("hydra/", "hydra."))]
    choices = []
    for word in words:
        key, _, value = word.partition("=")
        several = "," in value and not re.search(r"[\[\]{}'\"]", value)
        choices.append([f"{key}={one}" for one in value.split(",")] if several else [word])
    return [list(run) for run in itertools.product(*choices)]


COMMANDS = [
    command
    for page in PAGES
    for command in documented_commands(page.read_text(encoding="utf-8"), page.relative_to(ROOT))
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.place} {' '.join(command.argv)}"[:90])
def test_documented_command_composes(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *words = command.argv or [""]
    if name in {"", PLACEHOLDER, *FLAGS}:  # `ssl-vit` alone, or with a flag, lists the commands
        return
    assert name in cli.COMMANDS, f"there is no command {name}"
    wanted = [word for word in words if word not in FLAGS]
    if {"--help", "-h"} & set(words) or (not wanted and not command.in_block):
        return  # the command alone, in prose
    for word in wanted:
        if word.startswith("--config-dir="):
            make_recipes(Path(word.partition("=")[2]), wanted)
    runs = expand(wanted) if "--multirun" in wanted else [wanted]
    for run in runs:
        load_config(name, run, cli.COMMANDS[name].config_class())  # raises UserError with all that is wrong


def make_recipes(folder, words):
    """Write the recipe that a command line wants from its own configuration folder."""
    (folder / "recipes").mkdir(parents=True)
    for word in words:
        if word.startswith("recipe="):
            recipe = folder / "recipes" / f"{word.removeprefix('recipe=')}.yaml"
            recipe.write_text("# @package _global_\nseed: 1\n", encoding="utf-8")


def test_every_command_is_documented_with_arguments_or_alone():
    documented = {command.argv[0] for command in COMMANDS if command.argv}
    assert documented >= cli.COMMANDS.keys()


def test_documented_commands_finds_blocks_inline_code_and_launchers():
    text = (
        "Run `ssl-vit demo`, or `ssl-vit knn\ncheckpoint=x data.root=y`.\n"
        "```bash\n"
        "ssl-vit pretrain 'a=[1,2]' b=c   # comment `ssl-vit export`\n"
        "srun ssl-vit pretrain \\\n  d=e\n"
        "torchrun --nproc-per-node 4 -m ssl_vit features f=g\n"
        "pip install ssl-vit-other\n"
        "```\n"
        "```python\nssl-vit = 1\n```\n"
    )
    assert [command.argv for command in documented_commands(text, "page")] == [
        ["demo"],
        ["knn", "checkpoint=x", "data.root=y"],
        ["pretrain", "a=[1,2]", "b=c"],
        ["pretrain", "d=e"],
        ["features", "f=g"],
    ]


def test_expand_makes_a_run_of_every_combination():
    words = ["--multirun", "seed=0,1", "run.name=a-${seed}", "'k=[1,2]'", "hydra/launcher=joblib", "x=3,4"]
    runs = expand(words)
    assert len(runs) == 4
    assert ["seed=1", "run.name=a-${seed}", "'k=[1,2]'", "x=3"] in runs
