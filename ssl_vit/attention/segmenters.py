"""The methods that find an object without labels, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ssl_vit.attention.found import found
from ssl_vit.attention.lost import lost
from ssl_vit.attention.maps import Sight
from ssl_vit.attention.pca import fit_basis, pca_segmenter
from ssl_vit.attention.segmentation import Segmentation, Segmenter
from ssl_vit.attention.tokencut import tokencut
from ssl_vit.errors import UserError

__all__ = ["METHODS", "NEED_CLS", "Segmentation", "Segmenter", "make_segmenters"]

_OF_ONE_PICTURE: dict[str, Segmenter] = {"lost": lost, "tokencut": tokencut, "found": found}
METHODS = ("lost", "tokencut", "pca", "found")
NEED_CLS = frozenset({"found"})  # methods that read the attention of the class token


def make_segmenters(names: Sequence[str], sights: Iterable[Sight]) -> dict[str, Segmenter]:
    """The named methods, ready for pictures of one network.

    Args:
        names: Of `METHODS`.
        sights: What the network sees in a sample of the pictures; read only for pca, whose components are common to
            all pictures. The sample may be all pictures; a few hundred are enough.

    Raises:
        UserError: There is no method of a name, or pca has no picture.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UserError(f"no segmentation method is called {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return {name: pca_segmenter(fit_basis(sights)) if name == "pca" else _OF_ONE_PICTURE[name] for name in names}
