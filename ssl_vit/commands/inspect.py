"""`ssl-vit inspect`: what is inside a vision transformer, as panels, arrays and numbers.

ssl-vit inspect checkpoint=runs/photos
ssl-vit inspect checkpoint=timm:vit_small_patch16_224.dino images=photos out=inspect
ssl-vit inspect checkpoint=runs/photos images=photos versus=timm:vit_small_patch16_224.dino limit=1000
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.commands.run_figures import reconstruction_figure, training_views_figure
from ssl_vit.config.visualize import InspectConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, UnreadableImageError
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.sources.image_folder import load_images_at
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.provenance import model_name
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL, RANDOM
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone, random_init_like
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar
from ssl_vit.training.run_dir import CONFIG, read_config
from ssl_vit.visualization.analysis.activation_collector import Observer
from ssl_vit.visualization.analysis.analysis_result import (
    AnalysisResult,
    analyze_attention,
    analyze_features,
    analyze_layers,
    analyze_weights,
)
from ssl_vit.visualization.analysis.analysis_writer import INDEX, write_findings
from ssl_vit.visualization.analysis.cka import LinearCKA
from ssl_vit.visualization.image_grid import TitledFigure

TWIN = 2**20  # far from any seed that a run starts from: with its first weights a twin would look like the model
DRAWN = 4  # images
BATCH_PIXELS = 2**20  # of crops in one forward pass
_DIVERGED = "Training has diverged: take an earlier checkpoint"
NEED_IMAGES = ("rollout", "distance", "entropy", "prefix", "diversity", "norms", "spectrum", "layers")


class AnalysisOutput(NamedTuple):
    """What one run of the command did."""

    out: Path
    panels: int
    dataset: int
    skipped: int
    left_out: dict[str, str]
    seconds: float


def main(config: InspectConfig) -> None:
    """Run the command."""
    outcome = inspect(config)
    print(f"{outcome.panels} panels of {outcome.dataset:,} images in {outcome.seconds:.0f} s: {outcome.out / INDEX}")
    for why in dict.fromkeys(outcome.left_out.values()):
        print(f"no panel {', '.join(name for name, reason in outcome.left_out.items() if reason == why)}: {why}")
    if outcome.skipped:
        print(f"{outcome.skipped} images could not be used: {outcome.out / 'skipped_images.txt'} says why")


def inspect(config: InspectConfig) -> AnalysisOutput:
    """Write panels, arrays and `inspect.json` into the folder.

    Raises:
        UserError: A model cannot be loaded or has diverged, there is no image where some were named, or none that
            can be read.
    """
    start = time.perf_counter()
    models = {MODEL: _load(config.checkpoint, config)}
    if config.baselines:
        models[RANDOM] = random_init_like(models[MODEL], config.seed + TWIN)
    dataset = _images(config, models[MODEL].run)
    out = config.out or (models[MODEL].run or Path()) / "inspect"
    _check_apart(out, config.images)
    out.mkdir(parents=True, exist_ok=True)
    skipped = SkippedImageLog(out / "skipped_images.txt")
    skipped.path.unlink(missing_ok=True)
    found, count = AnalysisResult.none(), 0
    if dataset is None:
        needing = [*NEED_IMAGES, *(["versus"] if config.compare_to else [])]
        found.left_out.update(dict.fromkeys(needing, "no images: name some with images=FOLDER"))
    else:
        found, count = _of_images(config, dataset, models, skipped)
    found.add(analyze_weights(models))
    if run := models[MODEL].run:
        found.add(_of_run(Path(config.checkpoint), run))
    data = None if dataset is None else {"text": dataset.describe(), "fingerprint": dataset.fingerprint(sizes=True)}
    device = best_device()
    about = {
        "model": provenance.model_metadata(models[MODEL], config.checkpoint, config.weights),
        "versus": config.compare_to,
        "data": {"n": count, "skipped": skipped.count(), "images": data},
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "cost": provenance.runtime_cost(start, device),
        "environment": {**provenance.environment(device), "forward": "float32"},
        "tool": provenance.package_info(),
    }
    write_findings(out, found, about)
    return AnalysisOutput(out, len(found.panels), count, skipped.count(), found.left_out, time.perf_counter() - start)


def _load(checkpoint: str, config: InspectConfig) -> LoadedBackbone:
    loaded = load_backbone(checkpoint, config.weights, require_cls=False)
    if not all(values.isfinite().all() for values in loaded.backbone.parameters()):
        raise UserError(f"{loaded.source}: its weights are not finite. {_DIVERGED}")
    return loaded


def _images(config: InspectConfig, run: Path | None) -> ImageDataset | None:
    """Those that were named; else those of the run, if it says which and they are still there."""
    if config.images is not None:
        return load_images_at(config.images)
    if run is None or not (run / CONFIG).is_file():
        return None
    data = read_config(run)["data"]
    root = data.get("root") or data.get("train")
    return build_dataset(data["source"], Path(root)) if root and Path(root).exists() else None


def _check_apart(out: Path, images: Path | None) -> None:
    if images is not None and out.absolute().is_relative_to(images.absolute()):
        raise UserError(f"out={out} lies inside images={images}: choose a folder outside of it")


def _of_images(
    config: InspectConfig, dataset: ImageDataset, models: dict[str, LoadedBackbone], skipped: SkippedImageLog
) -> tuple[AnalysisResult, int]:
    """All that needs images, and how many there were."""
    other = None
    watched = dict(models)
    if config.compare_to is not None:
        loaded = _load(config.compare_to, config)
        other = model_name(loaded, config.compare_to, config.weights)
        other = f"{other} (versus)" if other in models else other
        watched[other] = loaded
    for loaded in watched.values():
        loaded.backbone.to(best_device())
    observers = {name: Observer(loaded, config.image_size) for name, loaded in watched.items()}
    similarity = LinearCKA()
    count = 0
    for crops in _batches(config, dataset, observers, skipped):
        drawn = max(0, DRAWN - count)
        count += len(next(iter(crops.values())))
        layers = [layer for name, observer in observers.items() for layer in observer.see(crops[name], drawn=drawn)]
        similarity.add(layers)
    if not count:
        raise UserError(f"no image could be used; {skipped.path} says why")
    seen = {name: observers[name].observation() for name in models}
    if not seen[MODEL].features.isfinite().all():
        raise UserError(f"{models[MODEL].source}: its features are not finite. {_DIVERGED}")
    found = analyze_attention(observers, seen)
    found.add(analyze_features(observers, seen))
    depths = {name: observer.depth for name, observer in observers.items()}
    found.add(analyze_layers(similarity.result(), depths, other, count))
    return found, count


def _of_run(checkpoint: Path, run: Path) -> AnalysisResult:
    """The views that it trained on, and what a SiT model restores."""
    found = AnalysisResult.none()
    drawings: dict[str, Callable[[], TitledFigure | None]] = {
        "views": partial(training_views_figure, run),
        "reconstruction": partial(reconstruction_figure, run, checkpoint if checkpoint.is_file() else None),
    }
    for name, make in drawings.items():
        try:
            panel = make()
        except UserError as reason:
            found.left_out[name] = str(reason)
            continue
        if panel is not None:
            found.panels[name] = panel
    return found


def _batches(
    config: InspectConfig, dataset: ImageDataset, observers: dict[str, Observer], skipped: SkippedImageLog
) -> Iterator[dict[str, Tensor]]:
    """The same images as every model takes them, (B, C, S, S) uint8 by model."""
    generator = torch.Generator().manual_seed(config.seed)
    places = torch.randperm(len(dataset), generator=generator)[: config.limit].tolist()
    size = max(1, BATCH_PIXELS // max(observer.cut.image_size for observer in observers.values()) ** 2)
    waiting: list[dict[str, Tensor]] = []
    given = 0
    for place in progress_bar(places, unit=" images", desc="inspect"):
        try:
            waiting.append(_crops(dataset, place, observers))
        except UnreadableImageError as broken:
            skipped.record(broken)
        if waiting and (len(waiting) == size or given < DRAWN):  # of a drawn image more is held in memory: alone
            yield _stacked(waiting)
            given += len(waiting)
            waiting = []
    if waiting:
        yield _stacked(waiting)


def _crops(dataset: ImageDataset, place: int, observers: dict[str, Observer]) -> dict[str, Tensor]:
    channels = {observer.backbone.config.in_chans for observer in observers.values()}
    read = {count: dataset.read(place, count) for count in channels}
    return {name: observer.cut(read[observer.backbone.config.in_chans]) for name, observer in observers.items()}


def _stacked(waiting: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {name: torch.stack([crops[name] for crops in waiting]) for name in waiting[0]}
