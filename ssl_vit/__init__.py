"""ssl-vit: self-supervised pretraining of vision transformers on your own images.

The names below are imported when they are first used, so that `import ssl_vit` loads neither torch nor Lightning, and
is so short that Ctrl-C finds `__main__` at work.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssl_vit.commands.api import (
        attention_maps,
        extract_features,
        finetune,
        knn,
        linear_probe,
        load_backbone,
        load_config,
        pretrain,
    )
    from ssl_vit.methods import DINO, SiT
    from ssl_vit.training.data_module import ImageDataModule

__all__ = [
    "DINO",
    "ImageDataModule",
    "SiT",
    "attention_maps",
    "extract_features",
    "finetune",
    "knn",
    "linear_probe",
    "load_backbone",
    "load_config",
    "pretrain",
]

_MODULES = {
    "DINO": "ssl_vit.methods",
    "ImageDataModule": "ssl_vit.training.data_module",
    "SiT": "ssl_vit.methods",
}  # all others: ssl_vit.commands.api

__version__: str


def _read_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ssl-vit")
    except PackageNotFoundError:  # a bare checkout that was never installed
        return "0+checkout"


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _read_version()
    elif name in __all__:
        value = getattr(importlib.import_module(_MODULES.get(name, "ssl_vit.commands.api")), name)
    else:
        raise AttributeError(f"module 'ssl_vit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
