"""The methods that find an object without labels, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ssl_vit.evaluation.segmentation.found import found_mask
from ssl_vit.evaluation.segmentation.lost import lost_mask
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation, Segmenter
from ssl_vit.evaluation.segmentation.pca import fit_basis, pca_segmenter
from ssl_vit.evaluation.segmentation.tokencut import tokencut_mask
from ssl_vit.models.attention_maps import LastBlockFeatures
from ssl_vit.runtime.errors import UserError

__all__ = ["METHODS", "NEED_CLS", "Segmentation", "Segmenter", "make_segmenters"]

_OF_ONE_IMAGE: dict[str, Segmenter] = {"lost": lost_mask, "tokencut": tokencut_mask, "found": found_mask}
METHODS = ("lost", "tokencut", "pca", "found")
NEED_CLS = frozenset({"found"})  # methods that read the attention of the class token


def make_segmenters(names: Sequence[str], sights: Iterable[LastBlockFeatures]) -> dict[str, Segmenter]:
    """The named methods, ready for images of one model.

    Args:
        names: Of `METHODS`.
        sights: What the model sees in a sample of the images; read only for pca, whose components are common to
            all images. The sample may be all images; a few hundred are enough.

    Raises:
        UserError: There is no method of a name, or pca has no image.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UserError(f"no segmentation method is called {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return {name: pca_segmenter(fit_basis(sights)) if name == "pca" else _OF_ONE_IMAGE[name] for name in names}
