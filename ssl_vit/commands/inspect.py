"""`ssl-vit inspect`: figures, arrays and statistics of what a vision transformer has learned.

ssl-vit inspect checkpoint=runs/photos
ssl-vit inspect checkpoint=timm:vit_small_patch16_224.dino images=photos out=inspect
ssl-vit inspect checkpoint=runs/photos images=photos compare_to=timm:vit_small_patch16_224.dino limit=1000
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.commands.run_figures import reconstruction_figure, training_views_figure
from ssl_vit.config.visualize import InspectConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, UnreadableImageError
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.sources.image_folder import load_images_at
from ssl_vit.data.value_notes import value_notes
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.provenance import model_name
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL, RANDOM
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone, random_init_like
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.runtime.progress import progress_bar
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.resume_checks import CONFIG, read_config
from ssl_vit.visualization.analysis.activation_collector import ActivationCollector
from ssl_vit.visualization.analysis.analysis_result import (
    INSPECT_JSON,
    AnalysisResult,
    analyze_attention,
    analyze_features,
    analyze_layers,
    analyze_weights,
    is_analysis,
)
from ssl_vit.visualization.analysis.cka import LinearCKA
from ssl_vit.visualization.image_grid import TitledFigure

RANDOM_SEED_OFFSET = 2**20  # else the random-init model could equal a checkpoint before training of the same seed
NUM_EXAMPLES = 4  # images in the figures
BATCH_PIXELS = 2**20  # of crops in one forward pass
IMAGE_FIGURES = ("rollout", "distance", "entropy", "prefix", "diversity", "norms", "spectrum", "layers")
_DIVERGED = "Training has diverged: use an earlier checkpoint"


class InspectSummary(NamedTuple):
    """What `inspect` wrote."""

    out: Path
    result: AnalysisResult
    num_images: int
    skipped: SkippedImageLog
    notes: list[str]  # how the images were decoded, where it is not plain
    seconds: float


def main(config: InspectConfig) -> None:
    """Run the command and print a summary."""
    out, result, num_images, skipped, notes, seconds = inspect(config)
    print(f"{len(result.figures)} figures of {num_images:,} images in {seconds:.0f} s: {out / INSPECT_JSON}")
    for reason in dict.fromkeys(result.skipped.values()):
        names = ", ".join(name for name, given in result.skipped.items() if given == reason)
        print(f"not drawn: {names}: {reason}")
    print("".join(f"{note}\n" for note in notes), end="")
    if skipped.count():
        print(f"{pluralize(skipped.count(), 'image')} could not be read, see {skipped.path}")


def inspect(config: InspectConfig) -> InspectSummary:
    """Write figures, arrays and `inspect.json` into `out`, by default into the run directory.

    Raises:
        UserError: A model cannot be loaded or has diverged, `images` does not exist, or none of them can be read.
    """
    start = time.perf_counter()
    models = {MODEL: load_backbone(config.checkpoint, config.weights, require_cls=False)}
    if config.baselines:
        models[RANDOM] = random_init_like(models[MODEL], config.seed + RANDOM_SEED_OFFSET)
    run = models[MODEL].run
    if dataset := _find_images(config, run):
        dataset.with_range(models[MODEL].value_range)
    out = config.out or (run or Path()) / "inspect"
    check_outputs([out], "inspect", inputs={"images": config.images}, is_own=is_analysis(out / INSPECT_JSON))
    skipped = SkippedImageLog(out / "skipped_images.txt")
    skipped.path.unlink(missing_ok=True)
    result, count = AnalysisResult(), 0
    if dataset is None:
        figures = [*IMAGE_FIGURES, *(["comparison"] if config.compare_to else [])]
        result.skipped.update(dict.fromkeys(figures, "no images: set images=FOLDER"))
    else:
        count = _analyze_images(config, dataset, models, skipped, result)
    analyze_weights(result, models)
    if run:
        _draw_training(Path(config.checkpoint), run, result)
    data = None if dataset is None else {"text": dataset.describe(), "fingerprint": dataset.fingerprint(sizes=True)}
    notes = [] if dataset is None else value_notes(dataset)
    device = best_device()
    metadata = {
        "model": provenance.model_metadata(models[MODEL], config.checkpoint, config.weights),
        "compare_to": config.compare_to,
        "images": {"count": count, "skipped": skipped.count(), "dataset": data, "notes": notes},
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "cost": provenance.runtime_cost(start, device),
        "environment": {**provenance.environment(device), "forward": "float32"},
        "tool": provenance.package_info(),
    }
    record_outputs([out], "inspect")
    result.write(out, metadata)
    return InspectSummary(out, result, count, skipped, notes, time.perf_counter() - start)


def _find_images(config: InspectConfig, run: Path | None) -> ImageDataset | None:
    """Return the images of `images`, else those of the run if they still exist."""
    if config.images is not None:
        return load_images_at(config.images)
    if run is None or not (run / CONFIG).is_file():
        return None
    data = read_config(run)["data"]
    root = data.get("root") or data.get("train")
    return build_dataset(data["source"], Path(root)) if root and Path(root).exists() else None


def _analyze_images(
    config: InspectConfig,
    dataset: ImageDataset,
    models: dict[str, LoadedBackbone],
    skipped: SkippedImageLog,
    result: AnalysisResult,
) -> int:
    """Add the analyses that need images, and return the number of images."""
    other, all_models = None, dict(models)
    if config.compare_to is not None:
        loaded = load_backbone(config.compare_to, config.weights, require_cls=False)
        name = model_name(loaded, config.compare_to, config.weights)
        other = f"{name} (compared)" if name in models else name
        all_models[other] = loaded
    for loaded in all_models.values():
        loaded.backbone.to(best_device())
    collectors = {name: ActivationCollector(loaded, config.image_size) for name, loaded in all_models.items()}
    cka, count = LinearCKA(), 0
    for crops in _iter_batches(config, dataset, collectors, skipped):
        examples = max(0, NUM_EXAMPLES - count)
        count += len(crops[MODEL])
        layers = (collector.update(crops[name], num_examples=examples) for name, collector in collectors.items())
        cka.update([*chain.from_iterable(layers)])
    if not count:
        raise UserError(f"no image could be read, see {skipped.path}")
    activations = {name: collectors[name].compute() for name in models}
    if not activations[MODEL].features.isfinite().all():
        raise UserError(f"{models[MODEL].source}: its features are not finite. {_DIVERGED}")
    analyze_attention(result, collectors[MODEL], activations)
    analyze_features(result, collectors[MODEL], activations)
    num_blocks = {name: collector.num_blocks for name, collector in collectors.items()}
    analyze_layers(result, cka.compute(), num_blocks, other, count)
    return count


def _draw_training(checkpoint: Path, run: Path, result: AnalysisResult) -> None:
    """Draw the first views of the training run, and what its method reconstructs."""
    figures: dict[str, Callable[[], TitledFigure | None]] = {
        "views": partial(training_views_figure, run),
        "reconstruction": partial(reconstruction_figure, run, checkpoint if checkpoint.is_file() else None),
    }
    for name, draw in figures.items():
        try:
            figure = draw()
        except UserError as reason:
            result.skipped[name] = str(reason)
            continue
        if figure is not None:
            result.figures[name] = figure


def _iter_batches(
    config: InspectConfig, dataset: ImageDataset, collectors: dict[str, ActivationCollector], skipped: SkippedImageLog
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of the same images for each model, (B, C, S, S) uint8 by model."""
    generator = torch.Generator().manual_seed(config.seed)
    indices = torch.randperm(len(dataset), generator=generator)[: config.limit].tolist()
    size = max(1, BATCH_PIXELS // max(collector.transform.image_size for collector in collectors.values()) ** 2)
    batch: list[dict[str, Tensor]] = []
    yielded = 0
    for position, index in enumerate(progress_bar(indices, unit=" images", desc="inspect"), start=1):
        try:
            batch.append(_read_crops(dataset, index, collectors))
        except UnreadableImageError as broken:
            skipped.record(broken)
        full = len(batch) == size or yielded < NUM_EXAMPLES or position == len(indices)
        if batch and full:  # examples alone: they need more memory
            yield {name: torch.stack([crops[name] for crops in batch]) for name in batch[0]}
            yielded += len(batch)
            batch = []


def _read_crops(dataset: ImageDataset, index: int, collectors: dict[str, ActivationCollector]) -> dict[str, Tensor]:
    """Read an image with the channels of each model, and crop it for each."""
    channels = {name: collector.backbone.config.in_chans for name, collector in collectors.items()}
    images = {count: dataset.read(index, count) for count in set(channels.values())}
    return {name: collector.transform(images[channels[name]]) for name, collector in collectors.items()}
