"""The built wheel works without the checkout: it holds the package, conf/ and recipes/."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "ssl_vit", "conf", "recipes", "tests", "tools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout stays clean and no earlier build is reused."""
    folder = tmp_path_factory.mktemp("wheel")
    for source in (CHECKOUT / name for name in SOURCES):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(folder)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder in which the wheel is installed; its dependencies come from the test environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """A function that runs Python with the installed wheel first on the path, in an unrelated folder."""

    def python(*argv):
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run(
            [sys.executable, *argv], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
        )

    return python


def test_wheel_contains_the_package_and_its_yaml_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"ssl_vit/{path.relative_to(CHECKOUT / 'ssl_vit')}" for path in (CHECKOUT / "ssl_vit").rglob("*.py")}
    for folder in ("conf", "recipes"):
        expected |= {f"ssl_vit/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / folder).rglob("*.yaml")}
    weights = (CHECKOUT / "recipes" / "weights").glob("*.*")
    expected |= {f"ssl_vit/{path.relative_to(CHECKOUT)}" for path in weights}
    assets = {path for suffix in ("html", "css", "js") for path in (CHECKOUT / "ssl_vit").rglob(f"*.{suffix}")}
    expected |= {path.relative_to(CHECKOUT).as_posix() for path in assets}
    assert names == expected | {"ssl_vit/py.typed"}


def test_wheel_declares_license_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert texts["LICENSE"] == (CHECKOUT / "LICENSE").read_text()
    assert "ssl-vit = ssl_vit.__main__:main" in texts["entry_points.txt"]


def test_wheel_is_imported_and_not_the_checkout(run, installed):
    shown = "print(ssl_vit.__file__, conf_dir(), recipes_dir())"
    code = f"import ssl_vit; from ssl_vit.runtime.shipped_files import *; {shown}"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(installed / "ssl_vit" / name) for name in ("__init__.py", "conf", "recipes")]


def test_wheel_finds_conf_and_recipes_from_any_folder(run):
    recipes = sorted(file.stem for file in (CHECKOUT / "recipes").glob("*.yaml"))
    result = run("-m", "ssl_vit", "pretrain", "data.root=x", f"recipe={recipes[0]}", "--cfg")
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["data"]["root"] == "x"
    result = run("-m", "ssl_vit", "pretrain", "--help")
    assert result.returncode == 0, result.stderr
    assert f"recipe=NAME uses the settings of a recipe: {', '.join(recipes)}" in result.stdout


def test_wheel_runs_a_command(run, sample):
    result = run("-m", "ssl_vit", "scan", f"data.root={sample / 'train'}")
    assert result.returncode == 0, result.stderr
    assert "192" in result.stdout
