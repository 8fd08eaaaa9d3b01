"""Where `conf/` and `recipes/` are: inside an installed wheel, or beside the package in a checkout."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def conf_dir() -> Path:
    """The folder of the configuration files."""
    return _packaged_or_beside("conf")


def recipes_dir() -> Path:
    """The folder of the recipes."""
    return _packaged_or_beside("recipes")


def _packaged_or_beside(name: str) -> Path:
    packaged = PACKAGE / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name
