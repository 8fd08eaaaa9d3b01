"""`ssl-vit attention`: attention maps of the [CLS] token for images of any size; with masks, their IoU.

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
from ssl_vit.data.annotations.object_masks import Annotation, MaskFolder, MissingMaskError
from ssl_vit.data.annotations.voc import VOCDataset
from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError
from ssl_vit.data.sources.image_folder import ImageFolder, load_images_at
from ssl_vit.data.value_notes import value_notes
from ssl_vit.evaluation.results.result_reader import is_result
from ssl_vit.evaluation.segmentation.image_outputs import run_backbone
from ssl_vit.evaluation.segmentation.mask_methods import build_predictors, check_methods
from ssl_vit.evaluation.segmentation.mask_scores import PredictedMasks
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MethodResult, SegmentationEvaluator
from ssl_vit.evaluation.segmentation.segmentation_result import score_table, write_image_scores, write_result
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone, load_start_of_run, random_init_like
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.runtime.progress import progress_bar
from ssl_vit.runtime.text import pluralize
from ssl_vit.visualization.overlays import OverlayInputs, make_overlay_inputs, overlay_grid
from ssl_vit.visualization.segmentation_writer import SegmentationWriter, plot_iou_curves

MAPS_NOTE = "attention is over the patches alone, scaled to sum 1; so it enters the heads' mean and FOUND"
OUTPUTS = ("maps", "masks", "overlays", "heads", "overview.jpg", "summary.json", "ious.npz", "curve.png")  # in `out`
GRID_ROWS = 3  # of the best, the median and the worst images each


class AttentionSummary(NamedTuple):
    """Outcome of the command; its files are in `config.out`."""

    written: int  # images
    skipped: SkippedImageLog  # images that could not be used
    unscored: SkippedImageLog  # images without a usable mask
    results: list[MethodResult]  # of the scored images; empty without masks
    notes: list[str]  # on how maps were computed and images and masks were read
    figure: Path
    seconds: float


def main(config: AttentionConfig) -> None:
    """Run the command."""
    if (config.out / "summary.json").exists():
        print(f"{config.out} contains an earlier result: its files of other images and methods are kept", flush=True)
    written, skipped, unscored, results, notes, figure, seconds = run_attention(config)
    if results:
        print(score_table(results, mass=config.attention_mass))
    print(f"{pluralize(written, 'image')} in {seconds:.0f} s ({written / seconds:.1f} images/s); see {figure}")
    for log, problem in ((skipped, "could not be used"), (unscored, "without a usable mask")):
        if log.count():
            print(f"{pluralize(log.count(), 'image')} {problem}: see {log.path}")
    print("\n".join([*notes, f"{config.out} contains overlays/, heads/, masks/ and maps/ under the images' names"]))


def run_attention(config: AttentionConfig) -> AttentionSummary:
    """Write maps, masks and overlays of all images into `config.out`, and score them where there is ground truth.

    Raises:
        UserError: There is no image, or none that could be used or, with masks, scored.
    """
    source = f"images={config.images}" if config.images else f"voc={config.voc}"
    dataset, annotations = _load_images(config)
    indices = range(len(dataset))[: config.limit]
    names = [dataset.name(index) for index in indices]
    outputs = [config.out / name for name in OUTPUTS]
    inputs = {"images": config.images, "masks": config.masks, "voc": config.voc}
    check_outputs(outputs, "attention", inputs=inputs, is_own=is_result(config.out / "summary.json", "attention"))
    models = _load_models(config, scored=annotations is not None)
    dataset.with_range(models[0].value_range)
    record_outputs(outputs, "attention")
    writer = SegmentationWriter(config.out, names)
    skipped, unscored = (SkippedImageLog(config.out / f"{kind}_images.txt") for kind in ("skipped", "unscored"))
    for log in (skipped, unscored):
        log.path.unlink(missing_ok=True)
    written = []
    start = time.perf_counter()
    predictors = build_predictors(
        models,
        dataset,
        count=len(indices),
        names=config.methods,
        mass=config.attention_mass,
        refine=config.refine is not None,
        max_side=config.max_side,
        skipped=skipped,
    )
    with TemporaryDirectory() as folder:
        evaluator = SegmentationEvaluator(Path(folder), mass=config.attention_mass, seed=config.seed)
        stream = run_backbone(dataset, indices, models=models, max_side=config.max_side, skipped=skipped)
        for index, image, features in progress_bar(stream, total=len(indices), unit=" images", desc="attention"):
            annotation = _annotation(annotations, names[index], image, unscored)
            predicted = [predict(own, image) for predict, own in zip(predictors, features, strict=True)]
            writer.write(index, _overlay_inputs(config, image, predicted[0], annotation))
            written.append(index)
            if annotation is not None:
                evaluator.update(index, predicted, annotation)
        seconds = time.perf_counter() - start
        if not written:
            raise UserError(f"{source}: no image could be used. See {skipped.path} for the reasons")
        if annotations and not evaluator.indices:
            source = f"masks={config.masks}" if config.masks else source
            raise UserError(f"{source}: no image has a usable mask. See {unscored.path} for the reasons")
        results = evaluator.compute() if annotations else []
    figure = _write_figure(config, dataset, writer, annotations, select_examples(written, evaluator.indices, results))
    notes = [MAPS_NOTE, f"position embeddings interpolated as by positions={config.positions}", *value_notes(dataset)]
    notes += annotations.notes() if annotations else []
    counts = {"num_images": len(written), "skipped": skipped.count(), "unscored": unscored.count()}
    data = {"fingerprint": dataset.fingerprint(sizes=True), **counts}
    write_result(config, models[0], results, data=data, notes=notes, started=start)
    write_image_scores(config.out / "ious.npz", results, [names[index] for index in evaluator.indices])
    plot_iou_curves(config.out / "curve.png", results, config.attention_mass)
    return AttentionSummary(len(written), skipped, unscored, results, notes, figure, seconds)


def _load_images(config: AttentionConfig) -> tuple[ImageFolder, MaskFolder | VOCDataset | None]:
    """Load all images of the folder or list, or the one named image, and their ground truth."""
    if config.voc is not None:
        voc = VOCDataset(config.voc, config.split)
        return voc.dataset, voc
    assert config.images is not None
    dataset = load_images_at(config.images)
    if config.masks is None:
        return dataset, None
    masks = MaskFolder(config.masks, dataset, config.mask_values)
    dataset = masks.pairs.images
    missing = [masks.pairs.why_missing(dataset.name(index)) for index in range(len(dataset))[: config.limit]]
    if all(missing):
        raise UserError(f"masks={config.masks}: no image has a mask; {dataset.name(0)}: {missing[0]}")
    return dataset, masks


def _load_models(config: AttentionConfig, *, scored: bool) -> list[LoadedBackbone]:
    """Load the model and, where there are scores to compare, its random-init model and its run's start weights."""
    models = [load_backbone(config.checkpoint, config.weights, require_cls=False, positions=config.positions)]
    check_methods(models[0], config.methods)
    if scored and config.baselines:
        models.append(random_init_like(models[0], config.seed))
        if start := load_start_of_run(models[0], positions=config.positions):
            models.append(start)
    for model in models:
        model.backbone.to(best_device())
    return models


def _annotation(
    annotations: MaskFolder | VOCDataset | None, name: str, image: Tensor, unscored: SkippedImageLog
) -> Annotation | None:
    """Return the annotation of an image, or None without a usable one."""
    if annotations is None:
        return None
    try:
        return annotations.annotation(name, (image.shape[-2], image.shape[-1]))
    except MissingMaskError as reason:
        unscored.record(UnreadableImageError(name, str(reason)))
        return None


def _overlay_inputs(
    config: AttentionConfig, image: Tensor, predicted: PredictedMasks, annotation: Annotation | None
) -> OverlayInputs:
    foreground, valid = (annotation.foreground, annotation.valid) if annotation is not None else (None, None)
    mass, methods = config.attention_mass, predicted.methods
    return make_overlay_inputs(image, predicted.maps, mass, foreground, valid=valid, methods=methods)


def select_examples(written: list[int], scored: list[int], results: list[MethodResult]) -> list[tuple[int, str]]:
    """Select the best, median and worst images by the mean of the heads, or else by the first method.

    Args:
        written: Indices of all images; without IoUs, some of them are selected, evenly spaced.
        scored: Indices of the scored images.
        results: Of the scored images, the model's first; or empty.

    Returns:
        Index and caption of each; the caption is empty if the image was not scored.
    """
    count = 3 * GRID_ROWS
    if not results or not results[0].ious:
        spaced = torch.linspace(0, len(written) - 1, min(len(written), count)).long().tolist()
        return [(sorted(written)[position], "") for position in spaced]
    ious = results[0].ious
    scores = ious["mass/mean"] if "mass/mean" in ious else next(iter(ious.values()))
    order = scores.argsort(descending=True).tolist()
    captioned = [("", row) for row in order]
    if len(order) > count:
        starts = {"best": 0, "median": (len(order) - GRID_ROWS) // 2, "worst": len(order) - GRID_ROWS}
        captioned = [(f"{name}\n", row) for name, start in starts.items() for row in order[start : start + GRID_ROWS]]
    return [(scored[row], f"{name}IoU {scores[row]:.2f}") for name, row in captioned]


def _write_figure(
    config: AttentionConfig,
    dataset: ImageFolder,
    writer: SegmentationWriter,
    annotations: MaskFolder | VOCDataset | None,
    examples: list[tuple[int, str]],
) -> Path:
    """Write `overview.jpg` with a row of tiles for each example, whose masks are read again from disk."""
    rows = []
    for index, caption in examples:
        name, image = dataset.name(index), dataset.read(index, 3)
        size = (image.shape[-2], image.shape[-1])
        annotation = annotations.annotation(name, size) if annotations and caption else None
        rows.append((f"{caption}\n{name}".strip(), _overlay_inputs(config, image, writer.load(index), annotation)))
    path = config.out / "overview.jpg"
    overlay_grid(rows).save(path, quality=90, subsampling=0)
    return path
