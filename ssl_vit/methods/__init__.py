"""Training methods as Lightning modules, by name; their configuration classes are in `config.methods`."""

from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.dino import DINO
from ssl_vit.methods.sit import SiT

__all__ = ["DINO", "METHODS", "SiT"]

METHODS: dict[str, type[SSLMethod]] = {"dino": DINO, "sit": SiT}
