"""The command line: the overview, --help, exit codes and messages."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import ssl_vit as ssl_vit_package
from ssl_vit import __version__
from ssl_vit.cli import COMMANDS
from ssl_vit.cli import main as ssl_vit
from ssl_vit.commands.load_config import compose_config
from ssl_vit.config.types import StrictConfig
from tests.helpers.cli import REQUIRED

PACKAGE = Path(ssl_vit_package.__file__).parent


def run(*argv, **options):
    """`python -m ssl_vit ARGV` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ssl_vit", *argv], capture_output=True, text=True, timeout=60, **options
    )


def leaves(values, prefix=""):
    """The values by dotted key."""
    flat = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_overview_lists_every_command_with_an_example_in_under_a_second():
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


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["nonsense"], ["pretrain", "--help"]])
def test_main_imports_nothing_heavy_before_a_command_runs(argv):
    code = (
        f"import sys; from ssl_vit.cli import main; main({argv})\n"
        "heavy = {'torch', 'hydra', 'lightning', 'timm', 'wandb', 'numpy', 'faiss', 'pydantic'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_main_reports_an_unknown_key_before_torch_is_imported(command):
    code = (
        f"import sys; from ssl_vit.cli import main; code = main([{command!r}, 'sede=1'])\n"
        "heavy = {'torch', 'lightning', 'timm', 'torchvision', 'wandb', 'faiss'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "sede: unknown key" in result.stderr
    assert result.returncode == 2, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_a_config_class_and_a_module(command):
    assert issubclass(COMMANDS[command].config_class(), StrictConfig)
    assert (PACKAGE / "commands" / f"{command}.py").is_file()
    assert COMMANDS[command].example.startswith(f"ssl-vit {command}")


@pytest.mark.parametrize("argv", [[], ["pretrain", "--help"], ["pretrain", "--cfg"]])
def test_main_exits_with_0_when_the_reader_of_its_output_is_gone(argv):
    # stdout is a pipe that nobody reads any more, as after `| head -1`
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl_vit", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    "interrupt",
    [
        "import ssl_vit.cli; ssl_vit.cli._run = lambda *_: exec('raise KeyboardInterrupt')",
        "F = type('', (), {'find_spec': lambda *_: exec('raise KeyboardInterrupt')}); sys.meta_path[:0] = [F]",
    ],
    ids=["during a command", "during the import of cli"],
)
def test_main_exits_with_130_after_ctrl_c(interrupt):
    code = f"import sys; from ssl_vit.__main__ import main; {interrupt}; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, "scan"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "")
    assert re.fullmatch(r"\nssl-vit( scan)?: stopped\n", result.stderr)


def test_main_names_checkpoints_near_a_missing_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/photos", "runs/other", "docs"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("photos", "other"):
        (tmp_path / "runs" / name / "config.yaml").touch()
    for missing, nearest in (("runs/fotos", "runs/photos"), ("photos", "runs/photos"), ("runs/othr", "runs/other")):
        assert ssl_vit(["export", f"checkpoint={missing}"]) == 2
        assert f"checkpoint={missing}: there is no such file or folder; near it: {nearest}" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["data.root=", "run.folder="])
def test_main_rejects_an_empty_path(override, capsys):
    assert ssl_vit(["pretrain", override]) == 2
    assert "the value after the equals sign is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "..", "a/b"])
def test_main_rejects_a_run_name_that_is_no_single_folder(name, capsys):
    assert ssl_vit(["pretrain", "data.root=photos", f"run.name={name}", "run.overwrite=true"]) == 2
    assert "run.name" in capsys.readouterr().err


def test_main_names_a_malformed_recipe(tmp_path, capsys):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("run: [\n", encoding="utf-8")
    assert ssl_vit(["pretrain", f"--config-dir={tmp_path}", "recipe=mine", "data.root=photos"]) == 2
    assert "mine.yaml" in capsys.readouterr().err


def test_main_names_a_file_in_place_of_an_output_folder(tmp_path, capsys):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "file").touch()
    assert ssl_vit(["scan", f"data.root={tmp_path / 'photos'}", f"out={tmp_path / 'file'}"]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_main_prints_the_version(capsys):
    assert ssl_vit(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("argv", [[command] for command in COMMANDS] + [["pretrain", "method=sit", "backbone=vit_cpu"]])
def test_help_lists_every_key_with_its_default(argv, capsys):
    """Its middle part is the composed configuration as commented YAML."""
    command, *options = argv
    assert ssl_vit([*argv, "--help"]) == 0
    text = capsys.readouterr().out
    assert COMMANDS[command].summary in text
    assert COMMANDS[command].example in text
    body = re.split(r"^recipe=NAME|^Quote lists", text.partition("defaults:\n")[2], flags=re.M)[0]
    composed = leaves(compose_config(command, options, COMMANDS[command].config_class()))
    listed = leaves(yaml.safe_load(body))
    assert listed.keys() == composed.keys()
    assert {key: value for key, value in listed.items() if value != composed[key] and "${" not in str(value)} == {}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pretain", "Did you mean pretrain?"), ("knnn", "Did you mean knn?"), ("xyz", "Choose one of demo, pretrain")],
)
def test_main_rejects_an_unknown_command_with_a_hint(name, hint, capsys):
    assert ssl_vit([name]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pretrain", "knn", "linear", "attention", "export", "scan", "shard"])
def test_main_names_a_missing_required_key(command, capsys):
    assert ssl_vit([command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ssl-vit {command}: ")
    assert re.search(r"is required: write (data\.root|checkpoint|images)=|data\.root=FOLDER", error)


@pytest.mark.parametrize(
    "argv",
    [
        ["pretrain", "data.root=nowhere"],
        ["knn", "checkpoint=nowhere", "data.root=nowhere"],
        ["linear", "checkpoint=nowhere", "data.root=nowhere"],
        ["attention", "checkpoint=nowhere", "images=nowhere"],
        ["export", "checkpoint=nowhere"],
        ["scan", "data.root=nowhere"],
        ["shard", "data.root=nowhere"],
        ["bench", "data.root=nowhere"],
    ],
    ids=lambda argv: argv[0],
)
def test_main_names_a_missing_file_and_writes_nothing(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ssl_vit(argv) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_main_as_module_and_as_script_does_the_same(tmp_path):
    script = Path(sys.executable).with_name("ssl-vit")
    module = run("pretain", "data.root=x", cwd=tmp_path)
    installed = subprocess.run([script, "pretain", "data.root=x"], capture_output=True, text=True, cwd=tmp_path)
    for result in (module, installed):
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "ssl-vit pretain: there is no such command. Did you mean pretrain?\n"


@pytest.mark.parametrize("command", ["attention", "scan", "export", "report", "compare"])
def test_commands_of_one_process_refuse_a_launcher(command, monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert ssl_vit([command, *REQUIRED[command]]) == 2
    assert "this command runs in one process" in capsys.readouterr().err


def test_main_names_a_lack_of_memory_in_one_line(monkeypatch, capsys):
    def run(name, overrides):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 25770590214 bytes.")

    monkeypatch.setattr("ssl_vit.cli._run", run)
    assert ssl_vit(["knn"]) == 2
    text = capsys.readouterr().err
    assert "too little memory" in text and "data.image_size" in text


def test_compare_of_a_pipe_does_not_wait(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert ssl_vit(["compare", str(tmp_path / "pipe")]) == 2
    assert "not a result" in capsys.readouterr().err
