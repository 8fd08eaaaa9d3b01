"""Attention maps of some images, and the masks that unsupervised methods predict for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.config.visualize import ReportConfig
from ssl_vit.data.annotations.object_masks import MaskFolder, MissingMaskError
from ssl_vit.data.dataset import evenly_spaced
from ssl_vit.evaluation.segmentation.image_outputs import ImageOutputs as Seen
from ssl_vit.evaluation.segmentation.image_outputs import run_backbone
from ssl_vit.evaluation.segmentation.iou import center_prior, downsample_mask, iou, pool_mask_to_patches
from ssl_vit.evaluation.segmentation.mask_methods import METHODS, NEED_CLS, build_segmenters
from ssl_vit.models.attention_maps import LastBlockFeatures, attention_mass_mask
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.image_grid import fit_size, to_pil
from ssl_vit.visualization.overlays import make_overlay_inputs
from ssl_vit.visualization.report.image_sources import GalleryImages, shown_images, skipped_list, skipped_text
from ssl_vit.visualization.report.run_results import RunFolder
from ssl_vit.visualization.report.schema import GalleryImage, Segmented

SIDE = 360  # pixels of an image's longer side


class Gallery(NamedTuple):
    """Some images with their maps, and with their masks where truth is known."""

    attended: list[GalleryImage]  # empty without a class token
    segmented: list[Segmented]
    how: str
    how_masked: str
    unmasked: str  # why there is no segmented image


def make_gallery(run: RunFolder, config: ReportConfig) -> Gallery:
    """Look at `config.limit` images, evenly spread over all that there are.

    Raises:
        UserError: There is no image that could be used, or no model, or it has diverged.
    """
    model = run.model
    shown = shown_images(run, config)
    truths = None if shown.masks is None else MaskFolder(shown.masks)
    places = evenly_spaced(len(shown.dataset), config.limit).tolist()
    with skipped_list() as skipped:
        stream = run_backbone(shown.dataset, places, models=[model], max_side=config.max_side, skipped=skipped)
        seen = sorted(stream, key=lambda one: one.image_index)
        left_out = skipped_text(skipped)
    if not seen:
        raise UserError(f"No image {shown.text} could be used.{left_out}")
    if not all(_is_finite(one.features[0]) for one in seen):
        raise UserError(f"{model.source}: its attention or its tokens are not finite: training has diverged.")
    masked = [(one, _truth(truths, shown, one)) for one in seen]
    attended = (
        [_attended(shown, one, truth, config.attention_mass) for one, truth in masked] if model.backbone.has_cls else []
    )
    segmented = _segmented(shown, masked, config.attention_mass)
    reduced = "" if config.max_side is None else f", larger ones reduced to {config.max_side} pixels"
    how = (
        f"{len(seen)} images {shown.text}, evenly spread over {len(shown.dataset):,}; each side brought to the "
        f"nearest multiple of the patch{reduced}. A map is the [CLS] row of the last block's softmax over all tokens "
        "in float32, patches only, scaled to sum 1; a mask is the fewest patches that hold the chosen share of it; "
        f"IoU is counted in pixels of the image at its own size.{left_out}"
    )
    return Gallery(
        attended, segmented, how, _how_masked(segmented, len(seen), config.attention_mass), _unmasked(shown, masked)
    )


def _is_finite(sight: LastBlockFeatures) -> bool:
    parts = (sight.patches, sight.keys, sight.patches if sight.cls is None else sight.cls)
    return all(bool(part.isfinite().all()) for part in parts)


def _truth(truths: MaskFolder | None, shown: GalleryImages, seen: Seen) -> Tensor | None:
    """Return the image's foreground mask (H, W) bool, if there is one of its size."""
    if truths is None:
        return None
    try:
        return truths.read(shown.dataset.name(seen.image_index), (seen.image.shape[-2], seen.image.shape[-1]))
    except MissingMaskError:
        return None


def _attended(shown: GalleryImages, seen: Seen, truth: Tensor | None, mass: float) -> GalleryImage:
    maps = seen.features[0].cls
    assert maps is not None  # the model has a class token
    example = make_overlay_inputs(seen.image, maps, mass, truth)
    size = fit_size(seen.image, min(SIDE, max(seen.image.shape[-2:])))
    return GalleryImage(shown.dataset.name(seen.image_index), to_pil(seen.image, size), maps, truth, example.ious)


def _segmented(shown: GalleryImages, masked: list[tuple[Seen, Tensor | None]], mass: float) -> list[Segmented]:
    """Return the images that have a ground-truth mask, with their predicted masks."""
    sights = [seen.features[0] for seen, _ in masked]
    names = [name for name in METHODS if sights[0].cls is not None or name not in NEED_CLS]
    segmenters = build_segmenters(names, sights)
    dataset = []
    for seen, truth in masked:
        if truth is None:
            continue
        sight = seen.features[0]
        masks = {} if sight.cls is None else {"attention": attention_mass_mask(sight.cls.mean(0), mass)}
        masks |= {name: segmenter(sight).mask for name, segmenter in segmenters.items()}
        counted = pool_mask_to_patches(truth, (sight.keys.shape[1], sight.keys.shape[2]))
        ious = dict(zip(masks, iou(torch.stack([*masks.values()]), counted).tolist(), strict=True))
        size = fit_size(seen.image, min(SIDE, max(seen.image.shape[-2:])))
        image = to_pil(seen.image, size)
        dataset.append(Segmented(shown.dataset.name(seen.image_index), image, truth, masks, ious))
    return dataset


def _how_masked(segmented: list[Segmented], seen: int, mass: float) -> str:
    """Nothing where there is no such image."""
    if not segmented:
        return ""
    count, names = len(segmented), segmented[0].ious
    means = [f"{name} {sum(one.ious[name] for one in segmented) / count:.2f}" for name in names]
    outlines = torch.stack([downsample_mask(one.truth) for one in segmented])  # (n, 64, 64)
    trivial = [f"the whole image {float(outlines.double().mean()):.2f}"]
    if count > 1:
        trivial.append(f"the center prior {float(center_prior(outlines)[0].mean()):.2f}")
    return (
        f"`attention` is the mask of the heads' mean map with {100 * mass:g} % of the attention; `lost` and `tokencut` "
        "are made of the last block's keys, `found` of these and the attention, `pca` of the patch tokens, its "
        f"components those of the {seen} images shown. Mean IoU of {count} images: {', '.join(means)}; without a "
        f"model: {', '.join(trivial)}. So few images show, they do not measure: `ssl-vit attention` does."
    )


def _unmasked(shown: GalleryImages, masked: list[tuple[Seen, Tensor | None]]) -> str:
    if any(truth is not None for _, truth in masked):
        return ""
    if shown.masks is None:
        return "There are no object masks to compare with. Name some: `images=FOLDER masks=FOLDER`."
    return f"None of the images shown has a usable mask in {shown.masks}."
