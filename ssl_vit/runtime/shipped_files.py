"""The folders of the checkout that travel inside the package: configuration, recipes, and their weights."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parents[1]


def conf_dir() -> Path:
    """Return the folder of the configuration files: inside an installed wheel, or beside the package in a checkout."""
    return _ROOT / "conf" if (_ROOT / "conf").is_dir() else _ROOT.parent / "conf"


def recipes_dir() -> Path:
    """Return the folder of the recipes."""
    return conf_dir().with_name("recipes")


def weights_dir() -> Path:
    """Return the folder of the weights that recipes have trained."""
    return recipes_dir() / "weights"
