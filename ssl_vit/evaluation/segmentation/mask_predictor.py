"""What a model finds in images by several methods: attention, and those that need no threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.evaluation.segmentation.guided_filter import check_opencv, refine
from ssl_vit.evaluation.segmentation.image_outputs import run_backbone
from ssl_vit.evaluation.segmentation.mask_methods import METHODS, NEED_CLS, Segmentation, make_segmenters
from ssl_vit.evaluation.segmentation.mask_scores import PredictedMasks
from ssl_vit.models.attention_maps import LastBlockFeatures, attention_mass_mask
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError

ATTENTION = "attention"
MEAN, REFINED = "mean", "+guided"  # the heads' mean, and what the names of refined masks end in
SAMPLE = 50  # images from which components common to all are found


def check_methods(model: LoadedBackbone, names: Sequence[str]) -> None:
    """Compare what the methods need with what the model has.

    Raises:
        UserError: A method needs the class token, and there is none.
    """
    needing = [name for name in names if name == ATTENTION or name in NEED_CLS]
    if needing and not model.backbone.has_cls:
        others = ",".join(name for name in METHODS if name not in NEED_CLS)
        raise UserError(
            f"methods=[{','.join(names)}]: {model.backbone.config.name} has no class token, which "
            f"{' and '.join(needing)} cannot do without; methods=[{others}] need none"
        )


class MaskPredictor:
    """The methods, ready for one model.

    Args:
        names: Of the methods; `attention` is that of the [CLS] token.
        sample: What the model sees in a sample of the images; read only where a method needs it.
        mass: Share of the attention that a mask holds.
        refine: Whether masks are also drawn along the images' edges: that of the heads' mean, and of each method.

    Raises:
        UserError: Masks are to be refined, and what that needs is not installed.
    """

    def __init__(self, names: Sequence[str], sample: Iterable[LastBlockFeatures], *, mass: float, refine: bool) -> None:
        if refine:
            check_opencv()
        self.with_attention = ATTENTION in names
        self.segmenters = make_segmenters([name for name in names if name != ATTENTION], sample)
        self.mass = mass
        self.refine = refine

    def __call__(self, sight: LastBlockFeatures, image: Tensor) -> PredictedMasks:
        """What is found in an image (C, H, W) uint8 that the model sees so."""
        maps = sight.cls if self.with_attention else None
        methods = {name: segmenter(sight) for name, segmenter in self.segmenters.items()}
        if self.refine:
            masks = {name: found.mask for name, found in methods.items()}
            if maps is not None:
                masks = {MEAN: attention_mass_mask(maps.mean(0), self.mass), **masks}
            for name, mask in masks.items():
                methods[name + REFINED] = from_mask(refine(mask, image))
        return PredictedMasks(maps, methods)


def from_mask(mask: Tensor) -> Segmentation:
    """A mask whose soft map says no more than itself."""
    return Segmentation(mask.float(), mask)


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
    """The methods for each model; what they need to know of all images is found from 50 that are spread evenly.

    Args:
        models: Of one architecture.
        dataset: Of any size.
        count: The first so many of them are used.
        names: Of the methods.
        mass: Share of the attention that a mask holds.
        refine: Whether the masks are also drawn along the images' edges.
        max_side: As for `attend`.
        skipped: As for `attend`.
    """
    places = torch.linspace(0, count - 1, min(count, SAMPLE)).long().tolist()
    finders = []
    for model in models:
        seen = run_backbone(dataset, places, models=[model], max_side=max_side, skipped=skipped)
        finders.append(MaskPredictor(names, (one.sights[0] for one in seen), mass=mass, refine=refine))
    return finders
