"""ssl-vit: self-supervised pretraining of vision transformers on your own images."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ssl-vit")
except PackageNotFoundError:  # a bare checkout that was never installed
    __version__ = "0+checkout"
