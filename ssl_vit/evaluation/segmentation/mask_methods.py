"""The segmentation methods without labels, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ssl_vit.evaluation.segmentation.found import found_mask
from ssl_vit.evaluation.segmentation.lost import lost_mask
from ssl_vit.evaluation.segmentation.patch_mask import Segmenter
from ssl_vit.evaluation.segmentation.pca import fit_pca, pca_segmenter
from ssl_vit.evaluation.segmentation.tokencut import tokencut_mask
from ssl_vit.models.attention_maps import LastBlockFeatures
from ssl_vit.runtime.errors import UserError

_SINGLE_IMAGE: dict[str, Segmenter] = {"lost": lost_mask, "tokencut": tokencut_mask, "found": found_mask}
METHODS = ("lost", "tokencut", "pca", "found")
NEED_CLS = frozenset({"found"})  # methods that read the attention of the class token


def build_segmenters(names: Sequence[str], sample: Iterable[LastBlockFeatures]) -> dict[str, Segmenter]:
    """Build the named methods for images of one model.

    Args:
        names: Of `METHODS`.
        sample: Features of a few hundred images or of all; read only for pca, whose components all images share.

    Raises:
        UserError: A name is unknown, or pca has no image.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UserError(f"unknown segmentation method {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    return {name: pca_segmenter(fit_pca(sample)) if name == "pca" else _SINGLE_IMAGE[name] for name in names}
