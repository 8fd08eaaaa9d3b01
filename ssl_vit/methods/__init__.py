"""DINO and SiT as Lightning modules."""

from ssl_vit.methods.dino import DINO
from ssl_vit.methods.sit import SiT

__all__ = ["DINO", "METHODS", "SiT"]

METHODS: dict[str, type[DINO] | type[SiT]] = {"dino": DINO, "sit": SiT}
