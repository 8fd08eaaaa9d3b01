"""The command line: quick and readable before a command is chosen, complete in its help, clear in its mistakes."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ssl_vit import __version__
from ssl_vit.cli import COMMANDS
from ssl_vit.cli import main as ssl_vit
from ssl_vit.commands.compose import compose_values


def run(*words, **options):
    """`python -m ssl_vit WORDS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ssl_vit", *words], capture_output=True, text=True, timeout=60, **options
    )


def leaves(values, prefix=""):
    """The values by their dotted keys."""
    flat = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_alone_it_shows_every_command_with_an_example_in_under_a_second():
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1
    assert result.returncode == 0
    assert result.stderr == ""
    for name in COMMANDS:
        assert re.search(rf"^  {name} .*\n +\$ ssl-vit {name}", result.stdout, flags=re.M)


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["nonsense"], ["pretrain", "--help"]])
def test_nothing_heavy_is_imported_before_a_command_runs(words):
    code = (
        f"import sys; from ssl_vit.cli import main; main({words})\n"
        "heavy = {'torch', 'hydra', 'lightning', 'timm', 'wandb', 'numpy', 'faiss', 'pydantic'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_version(capsys):
    assert ssl_vit(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    "words", [[command] for command in COMMANDS] + [["pretrain", "method=sit", "backbone=vit_cpu"]]
)
def test_help_holds_every_key_with_its_default(words, capsys):
    """Between its first and its last words, the help is the composed configuration, with comments."""
    command, *options = words
    assert ssl_vit([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert COMMANDS[command].summary in text
    assert COMMANDS[command].example in text
    body = re.split(r"^recipe=NAME|^Lists are written", text.partition("defaults:\n")[2], flags=re.M)[0]
    told, composed = leaves(yaml.safe_load(body)), leaves(compose_values(command, options))
    assert told.keys() == composed.keys()
    assert {key: value for key, value in told.items() if value != composed[key] and "${" not in str(value)} == {}


@pytest.mark.parametrize(
    ("word", "told"),
    [("pretain", "did you mean pretrain?"), ("knnn", "did you mean knn?"), ("xyz", "choose one of demo, pretrain")],
)
def test_unknown_command(word, told, capsys):
    assert ssl_vit([word]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", [["pretrain"], ["knn"], ["linear"], ["attention"], ["export"], ["scan"]])
def test_a_command_without_what_it_needs_says_so(words, capsys):
    assert ssl_vit(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ssl-vit {words[0]}: ")
    assert re.search(r"is needed: write (data\.root|checkpoint|images)=|data\.root=FOLDER", error)


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "data.root=nowhere"],
        ["knn", "checkpoint=nowhere", "data.root=nowhere"],
        ["linear", "checkpoint=nowhere", "data.root=nowhere"],
        ["attention", "checkpoint=nowhere", "images=nowhere"],
        ["export", "checkpoint=nowhere"],
        ["scan", "data.root=nowhere"],
    ],
    ids=lambda words: words[0],
)
def test_what_is_not_there_is_named(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ssl_vit(words) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_it_works_as_a_module_and_as_a_script(tmp_path):
    script = Path(sys.executable).with_name("ssl-vit")
    module = run("scan", "sede=1", cwd=tmp_path)
    installed = subprocess.run([script, "scan", "sede=1"], capture_output=True, text=True, cwd=tmp_path)
    for result in (module, installed):
        assert result.returncode == 2
        assert result.stdout == ""
        assert "sede: unknown key" in result.stderr
        assert "Traceback" not in result.stderr
    assert module.stderr == installed.stderr
