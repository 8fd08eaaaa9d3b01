"""Attention maps of some images, and the masks that unsupervised methods predict for them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from PIL import Image

from ssl_vit.config.visualize import MaskValuesConfig, ReportConfig
from ssl_vit.data.annotations.object_masks import Annotation, MaskFolder, MissingMaskError
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, evenly_spaced
from ssl_vit.data.dataset_factory import build_feature_splits
from ssl_vit.data.sources.image_folder import ImageFolder, load_images_at
from ssl_vit.data.value_notes import value_notes
from ssl_vit.evaluation.segmentation.image_outputs import ImageOutputs, run_backbone
from ssl_vit.evaluation.segmentation.iou import center_prior, downsample_mask
from ssl_vit.evaluation.segmentation.mask_methods import METHODS, NEED_CLS, build_segmenters
from ssl_vit.models.attention_maps import LastBlockFeatures
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.image_grid import fit_size, to_pil
from ssl_vit.visualization.overlays import OverlayInputs, make_overlay_inputs
from ssl_vit.visualization.report.feature_images import NO_IMAGES, skipped_text, trained_images
from ssl_vit.visualization.report.report_data import GalleryImage, MaskImage
from ssl_vit.visualization.report.run_reader import RunContent

SIDE = 360  # pixels of an image's longer side


class Gallery(NamedTuple):
    """Some images with their attention maps, and those of them that have a ground truth mask with predicted masks."""

    images: list[GalleryImage]  # empty without a class token
    masks: list[MaskImage]
    protocol: str
    mask_protocol: str
    missing_masks: str  # why there are none


def make_gallery(run: RunContent, config: ReportConfig) -> Gallery:
    """Compute maps and masks of `config.limit` images, evenly spaced over all that there are.

    Raises:
        UserError: There is no image that can be used, or no model, or it has diverged.
    """
    model, mass = run.model, config.attention_mass
    chosen = _choose_images(run, config)
    dataset, ground_truth, origin = chosen.dataset.with_range(model.value_range), None, chosen.origin
    if chosen.masks is not None and isinstance(dataset, ImageFolder):
        ground_truth = MaskFolder(chosen.masks, dataset, chosen.mask_values)
        dataset = ground_truth.pairs.images
    indices = evenly_spaced(len(dataset), config.limit).tolist()
    with TemporaryDirectory() as folder:
        skipped = SkippedImageLog(Path(folder) / "skipped_images.txt")
        stream = run_backbone(dataset, indices, models=[model], max_side=config.max_side, skipped=skipped)
        outputs = sorted(stream, key=lambda output: output.image_index)
        excluded = skipped_text(skipped)
    if not outputs:
        raise UserError(f"No image {origin} could be used.{excluded}")
    features = [output.features[0] for output in outputs]
    if not all(_is_finite(each) for each in features):
        raise UserError(f"{model.source}: its attention or its tokens are not finite: training has diverged.")
    names = [name for name in METHODS if model.backbone.has_cls or name not in NEED_CLS]
    segmenters = build_segmenters(names, features) if ground_truth is not None else {}
    images, masks = [], []
    for output, each in zip(outputs, features, strict=True):
        truth = None if ground_truth is None else _read_annotation(ground_truth, dataset, output)
        target, valid = (None, None) if truth is None else (truth.foreground, truth.valid)
        methods = {} if target is None else {name: segmenter(each) for name, segmenter in segmenters.items()}
        inputs = make_overlay_inputs(output.image, each.cls, mass, target, valid=valid, methods=methods)
        name = dataset.name(output.image_index)
        image = to_pil(output.image, fit_size(output.image, min(SIDE, max(output.image.shape[-2:]))))
        if each.cls is not None:
            images.append(GalleryImage(name, image, each.cls, target, valid, inputs.ious))
        if target is not None:
            masks.append(_mask_image(name, image, inputs))
    reduced = "" if config.max_side is None else f", larger ones reduced to {config.max_side} pixels"
    protocol = (
        f"{len(outputs)} images {origin}, evenly spread over {len(dataset):,}; each side brought to the "
        f"nearest multiple of the patch{reduced}. A map is the [CLS] row of the last block's softmax over all tokens "
        "in float32, patches only, scaled to sum 1; a mask is the fewest patches that hold the chosen share of it; "
        f"IoU is counted in pixels of the image at its own size.{excluded}"
        + "".join(f" {note}." for note in [*(ground_truth.notes() if ground_truth else []), *value_notes(dataset)])
    )
    missing = ""
    if chosen.masks is None:
        missing = "There are no object masks to compare with. Name some: `images=FOLDER masks=FOLDER`."
    elif not masks:
        missing = f"None of the images shown has a usable mask in {chosen.masks}."
    return Gallery(images, masks, protocol, _mask_protocol(masks, len(outputs), mass) if masks else "", missing)


class _ChosenImages(NamedTuple):
    dataset: ImageDataset
    origin: str  # which images they are
    masks: Path | None = None
    mask_values: MaskValuesConfig | None = None


def _choose_images(run: RunContent, config: ReportConfig) -> _ChosenImages:
    """Choose the named images; else those of a result on masks; else the run's own; else the labeled ones.

    Raises:
        UserError: They no longer exist.
    """
    if config.images is not None:
        return _ChosenImages(load_images_at(config.images), f"of {config.images}", config.masks, config.mask_values)
    for result in run.results:
        images, masks = (result.data.get(key) for key in ("images", "masks"))
        if images is not None and Path(images).exists():
            values = result.config.get("mask_values")
            return _ChosenImages(
                load_images_at(Path(images)),
                f"of {result.data.name}",
                None if masks is None else Path(masks),
                None if values is None else MaskValuesConfig.model_validate(values),
            )
    try:
        return _ChosenImages(build_feature_splits(trained_images(run, config)).train, "that the run has learned from")
    except UserError as error:
        if not config.data.named:
            raise UserError(f"The run's own images are not there: {error}. {NO_IMAGES}") from None
    return _ChosenImages(build_feature_splits(config.data).train, "of the labeled set")


def _is_finite(features: LastBlockFeatures) -> bool:
    return all(bool(part.isfinite().all()) for part in features if part is not None)


def _read_annotation(masks: MaskFolder, dataset: ImageDataset, output: ImageOutputs) -> Annotation | None:
    """Return the image's mask, if there is one of its size."""
    try:
        return masks.annotation(dataset.name(output.image_index), (output.image.shape[-2], output.image.shape[-1]))
    except MissingMaskError:
        return None


def _mask_image(name: str, image: Image.Image, inputs: OverlayInputs) -> MaskImage:
    """Return an image with its masks: that of the heads' mean map, if there is one, and those of the other methods."""
    assert inputs.target is not None and inputs.ious is not None
    masks, ious = [found.mask for found in inputs.methods.values()], dict(inputs.method_ious)
    if inputs.ious:
        masks, ious = [inputs.masks[-1], *masks], {"attention": inputs.ious[-1], **ious}
    return MaskImage(name, image, inputs.target, torch.stack(masks), ious)


def _mask_protocol(masks: list[MaskImage], num_shown: int, mass: float) -> str:
    count = len(masks)
    means = [f"{name} {sum(each.ious[name] for each in masks) / count:.2f}" for name in masks[0].ious]
    targets = torch.stack([downsample_mask(each.ground_truth) for each in masks])  # (n, 64, 64)
    trivial = [f"the whole image {float(targets.double().mean()):.2f}"]
    if count > 1:
        trivial.append(f"the center prior {float(center_prior(targets)[0].mean()):.2f}")
    return (
        f"`attention` is the mask of the heads' mean map with {100 * mass:g} % of the attention; `lost` and `tokencut` "
        "are made of the last block's keys, `found` of these and the attention, `pca` of the patch tokens, its "
        f"components those of the {num_shown} images shown. Mean IoU of {count} images: {', '.join(means)}; without a "
        f"model: {', '.join(trivial)}. So few images show, they do not measure: `ssl-vit attention` does."
    )
