"""`ssl-vit attention`: what the [CLS] token looks at in images of any size; with masks, how well it finds objects.

ssl-vit attention checkpoint=runs/photos images=photos out=maps
ssl-vit attention checkpoint=timm:vit_small_patch16_224.dino images=photo.jpg
ssl-vit attention checkpoint=runs/photos images=ecssd/images masks=ecssd/masks out=maps
ssl-vit attention checkpoint=runs/photos images=photos out=maps 'methods=[attention,lost,tokencut,pca,found]'
ssl-vit attention checkpoint=runs/photos voc=VOCdevkit/VOC2012 split=val out=voc
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.config.visualize import AttentionConfig
from ssl_vit.data.annotations.object_masks import Annotation, AnnotationSource, MaskFolder, MissingMaskError
from ssl_vit.data.annotations.voc import VOCDataset
from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError
from ssl_vit.data.sources.image_folder import ImageFolder, load_images_at
from ssl_vit.evaluation.segmentation.image_outputs import run_backbone
from ssl_vit.evaluation.segmentation.mask_predictor import build_predictors, check_methods
from ssl_vit.evaluation.segmentation.mask_scores import PredictedMasks
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MethodResult, Summary
from ssl_vit.evaluation.segmentation.segmentation_result import write_ious, write_record
from ssl_vit.evaluation.segmentation.segmentation_table import score_table
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone, random_init_like
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar
from ssl_vit.visualization.overlays import OverlayInputs, make_overlay_inputs, overlay_grid
from ssl_vit.visualization.segmentation_writer import SegmentationWriter, plot_iou_curves

SHEET_ROWS = 3  # of the best, the middle and the worst images each


class AttentionSummary(NamedTuple):
    """What one run of the command did; its files lie in `config.out`."""

    written: int  # images
    skipped: int  # images that could not be used
    unscored: int  # images without a mask that they could be scored by
    results: list[MethodResult]  # of the scored images; empty without masks
    remarks: list[str]  # on how the masks were read
    sheet: Path
    seconds: float


def main(config: AttentionConfig) -> None:
    """Run the command."""
    if (config.out / "summary.json").exists():
        print(f"{config.out} holds an earlier result: what it has of other images and methods stays", flush=True)
    outcome = run_attention(config)
    if outcome.results:
        print(score_table(outcome.results, mass=config.attention_mass))
    print(_report(config, outcome))


def run_attention(config: AttentionConfig) -> AttentionSummary:
    """Write maps, masks and drawings of all images into `config.out`, and score them where masks are given.

    Raises:
        UserError: There is no image, or none that could be used or, with masks, scored.
    """
    with TemporaryDirectory() as scores:
        return _segment(config, Summary(Path(scores), mass=config.attention_mass, seed=config.seed))


def _segment(config: AttentionConfig, summary: Summary) -> AttentionSummary:
    dataset, truths = _images(config)
    models = _models(config, scored=truths is not None)
    places = range(len(dataset))[: config.limit]
    gallery = SegmentationWriter(config.out, [dataset.name(place) for place in places])
    skipped, unscored = (_fresh_list(config.out / f"{name}_images.txt") for name in ("skipped", "unscored"))
    written = []
    start = time.perf_counter()
    finders = build_predictors(
        models, dataset, count=len(places), names=config.methods, mass=config.attention_mass, refine=config.refine is not None,
        max_side=config.max_side, skipped=skipped,
    )  # fmt: skip
    stream = run_backbone(dataset, places, models=models, max_side=config.max_side, skipped=skipped)
    for seen in progress_bar(stream, total=len(places), unit=" images", desc="attention"):
        given = _given(truths, dataset.name(seen.place), seen.image, unscored)
        objects = [find(sight, seen.image) for find, sight in zip(finders, seen.sights, strict=True)]
        gallery.write(seen.place, _example(config, seen.image, objects[0], given))
        written.append(seen.place)
        if given is not None:
            summary.add(seen.place, objects, given)
    seconds = time.perf_counter() - start
    if not written:
        source = f"images={config.images}" if config.images else f"voc={config.voc}"
        raise UserError(f"{source}: no image could be used; {skipped.path} says why")
    if truths and not summary.places:
        source = f"masks={config.masks}" if config.masks else f"voc={config.voc}"
        raise UserError(f"{source}: no image has a usable mask; {unscored.path} says why")
    results = summary.results() if truths else []
    sheet = _write_sheet(config, dataset, gallery, truths, select_examples(written, summary, results))
    remarks = truths.notes() if truths else []
    outcome = AttentionSummary(len(written), skipped.count(), unscored.count(), results, remarks, sheet, seconds)
    _write_results(config, models[0], outcome, dataset, [dataset.name(place) for place in summary.places], start)
    return outcome


def _write_results(
    config: AttentionConfig,
    model: LoadedBackbone,
    outcome: AttentionSummary,
    dataset: ImageFolder,
    scored: list[str],
    started: float,
) -> None:
    """The record, the scores of every image by name, and the curve of the thresholds."""
    counts = {"num_images": outcome.written, "skipped": outcome.skipped, "unscored": outcome.unscored}
    data = {"fingerprint": dataset.fingerprint(sizes=True), **counts}
    write_record(config, model, outcome.results, data=data, remarks=outcome.remarks, started=started)
    write_ious(config.out / "ious.npz", outcome.results, scored)
    plot_iou_curves(config.out / "curve.png", outcome.results, config.attention_mass)


def _images(config: AttentionConfig) -> tuple[ImageFolder, AnnotationSource | None]:
    """All images of the folder or list, or the one image that was named; and what is given of them."""
    if config.voc is not None:
        voc = VOCDataset(config.voc, config.split)
        return voc.dataset, voc
    assert config.images is not None
    if config.out.absolute().is_relative_to(config.images.absolute()):
        raise UserError(f"out={config.out} lies inside images={config.images}: choose a folder outside of it")
    return load_images_at(config.images), MaskFolder(config.masks) if config.masks else None


def _models(config: AttentionConfig, *, scored: bool) -> list[LoadedBackbone]:
    """The model, and beside it the same with random weights where there are scores to compare."""
    models = [load_backbone(config.checkpoint, config.weights, require_cls=False)]
    check_methods(models[0], config.methods)
    if scored and config.baselines:
        models.append(random_init_like(models[0], config.seed))
    for model in models:
        model.backbone.to(best_device())
    return models


def _fresh_list(path: Path) -> SkippedImageLog:
    path.unlink(missing_ok=True)
    return SkippedImageLog(path)


def _given(truths: AnnotationSource | None, name: str, image: Tensor, unscored: SkippedImageLog) -> Annotation | None:
    """What is given of the image, if it is something that fits."""
    if truths is None:
        return None
    try:
        return truths.annotation(name, (image.shape[-2], image.shape[-1]))
    except MissingMaskError as reason:
        unscored.record(UnreadableImageError(name, str(reason)))
        return None


def _example(
    config: AttentionConfig, image: Tensor, objects: PredictedMasks, given: Annotation | None
) -> OverlayInputs:
    truth, counted = (given.foreground, given.valid) if given is not None else (None, None)
    return make_overlay_inputs(
        image, objects.maps, config.attention_mass, truth, valid=counted, methods=objects.methods
    )


class _Chosen(NamedTuple):
    place: int  # among the images
    caption: str


def select_examples(written: list[int], summary: Summary, results: list[MethodResult]) -> list[_Chosen]:
    """Images for the sheet: the best, the middle and the worst by the heads' mean, or else the first method.

    Unscored ones, and those that have boxes alone, are evenly spread.
    """
    rows = 3 * SHEET_ROWS
    if not results or not results[0].ious:
        spread = torch.linspace(0, len(written) - 1, min(len(written), rows)).long().tolist()
        return [_Chosen(sorted(written)[place], "") for place in spread]
    ious = results[0].ious
    scores = ious["mass/mean"] if "mass/mean" in ious else next(iter(ious.values()))
    order = scores.argsort(descending=True).tolist()
    named = [("", place) for place in order]
    if len(order) > rows:
        starts = {"best": 0, "median": (len(order) - SHEET_ROWS) // 2, "worst": len(order) - SHEET_ROWS}
        named = [(f"{name}\n", place) for name, start in starts.items() for place in order[start : start + SHEET_ROWS]]
    return [_Chosen(summary.places[place], f"{name}IoU {scores[place]:.2f}") for name, place in named]


def _write_sheet(
    config: AttentionConfig,
    dataset: ImageFolder,
    gallery: SegmentationWriter,
    truths: AnnotationSource | None,
    chosen: list[_Chosen],
) -> Path:
    """`sheet.jpg`: a row of tiles for each chosen image, read again from disk."""
    rows = []
    for place, caption in chosen:
        image = dataset.read(place, 3)
        given = (
            truths.annotation(dataset.name(place), (image.shape[-2], image.shape[-1])) if truths and caption else None
        )
        caption = f"{caption}\n{dataset.name(place)}".strip()
        rows.append((caption, _example(config, image, gallery.load(place), given)))
    path = config.out / "sheet.jpg"
    overlay_grid(rows).save(path, quality=90, subsampling=0)
    return path


def _report(config: AttentionConfig, outcome: AttentionSummary) -> str:
    """What was done and where it lies, in a few lines."""
    rate = outcome.written / outcome.seconds
    lines = [f"{outcome.written} images in {outcome.seconds:.0f} s ({rate:.1f} a second); see {outcome.sheet}"]
    if outcome.skipped:
        lines.append(f"{outcome.skipped} images could not be used: {config.out / 'skipped_images.txt'} says why")
    if outcome.unscored:
        lines.append(f"{outcome.unscored} images have no usable mask: {config.out / 'unscored_images.txt'} says why")
    lines += outcome.remarks
    lines.append(f"{config.out} holds overlays/, heads/, masks/ and maps/ under the images' names")
    return "\n".join(lines)
