"""The methods that predict masks, by name: attention of the class token, and methods that need no threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.evaluation.segmentation.guided_filter import import_opencv, refine
from ssl_vit.evaluation.segmentation.image_outputs import run_backbone
from ssl_vit.evaluation.segmentation.mask_scores import PredictedMasks
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation, Segmenter, found_mask, lost_mask
from ssl_vit.evaluation.segmentation.pca import fit_pca, pca_segmenter
from ssl_vit.evaluation.segmentation.tokencut import tokencut_mask
from ssl_vit.models.attention_maps import LastBlockFeatures, attention_mass_mask
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError

ATTENTION = "attention"
METHODS = ("lost", "tokencut", "pca", "found")  # others than attention
NEED_CLS = frozenset({"found"})  # of these: methods that read the attention of the class token
MEAN, REFINED = "mean", "+guided"  # name of the heads' mean, and suffix of refined masks
PCA_IMAGES = 50  # from which the components that all images share are computed
_SINGLE_IMAGE: dict[str, Segmenter] = {"lost": lost_mask, "tokencut": tokencut_mask, "found": found_mask}


def build_segmenters(names: Sequence[str], sample: Iterable[LastBlockFeatures]) -> dict[str, Segmenter]:
    """Build the named methods, of `METHODS`, for images of one model.

    The sample, features of a few hundred images or of all, is read only for pca, whose components all images share.

    Raises:
        UserError: A name is unknown, or pca has no image.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UserError(f"unknown segmentation method {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    return {name: pca_segmenter(fit_pca(sample)) if name == "pca" else _SINGLE_IMAGE[name] for name in names}


def check_methods(model: LoadedBackbone, names: Sequence[str]) -> None:
    """Check that a model has what the methods need.

    Raises:
        UserError: A method needs the class token, and there is none.
    """
    needing = [name for name in names if name == ATTENTION or name in NEED_CLS]
    if needing and not model.backbone.has_cls:
        others = ",".join(name for name in METHODS if name not in NEED_CLS)
        raise UserError(
            f"methods=[{','.join(names)}]: {model.backbone.config.name} has no class token, which "
            f"{' and '.join(needing)} cannot do without. Use methods=[{others}]"
        )


class MaskPredictor:
    """Methods for one model, `attention` among them if it is named.

    Args:
        names: Of the methods.
        sample: Features of some images; read only where a method needs it.
        mass: Share of the attention inside a mask.
        refine: Also refine masks along the edges of the image: that of the heads' mean, and of each method.

    Raises:
        UserError: OpenCV's extra modules, which refinement needs, are not installed.
    """

    def __init__(self, names: Sequence[str], sample: Iterable[LastBlockFeatures], *, mass: float, refine: bool) -> None:
        if refine:
            import_opencv()
        self.with_attention = ATTENTION in names
        self.segmenters = build_segmenters([name for name in names if name != ATTENTION], sample)
        self.mass = mass
        self.refine = refine

    def __call__(self, features: LastBlockFeatures, image: Tensor) -> PredictedMasks:
        """Predict the masks of an image (C, H, W) uint8 from its features."""
        maps = features.cls if self.with_attention else None
        methods = {name: segmenter(features) for name, segmenter in self.segmenters.items()}
        if self.refine:
            masks = {} if maps is None else {MEAN: attention_mass_mask(maps.mean(0), self.mass)}
            masks |= {name: found.mask for name, found in methods.items()}
            for name, mask in masks.items():
                refined = refine(mask, image)
                methods[name + REFINED] = Segmentation(refined.float(), refined)
        return PredictedMasks(maps, methods)


def build_predictors(
    models: list[LoadedBackbone],
    dataset: ImageDataset,
    *,
    count: int,
    names: Sequence[str],
    mass: float,
    refine: bool,
    max_side: int | None,
    skipped: SkippedImageLog,
) -> list[MaskPredictor]:
    """Build the methods for each model; components for pca are computed from 50 of the first `count` images."""
    indices = torch.linspace(0, count - 1, min(count, PCA_IMAGES)).long().tolist()
    predictors = []
    for model in models:
        outputs = run_backbone(dataset, indices, models=[model], max_side=max_side, skipped=skipped)
        sample = (one.features[0] for one in outputs)
        predictors.append(MaskPredictor(names, sample, mass=mass, refine=refine))
    return predictors
