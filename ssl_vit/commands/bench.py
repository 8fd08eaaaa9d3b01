"""`ssl-vit bench`: how fast a configuration trains on this machine, where the time goes, and how two compare.

ssl-vit bench
ssl-vit bench data.root=photos backbone=vit_small method=sit
ssl-vit bench data.root=photos 'compare_to=[trainer.precision=32-true]'
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import BenchConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.sources.synthetic import HEIGHT, WIDTH, make_synthetic_photos
from ssl_vit.runtime.atomic_io import write_json
from ssl_vit.runtime.device import measure_matmul
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.benchmark import BenchmarkRun, Row
from ssl_vit.training.benchmark_report import (
    ROWS,
    BenchmarkResult,
    Comparison,
    bottleneck,
    describe,
    format_result,
    machine,
    to_json,
)
from ssl_vit.training.trainer import silence_lightning

NUM_PHOTOS = 128  # generated if no images are given
REPEATS = 10_000  # of each photo, so that an epoch is as long as that of a large dataset
BUSY = 0.5  # load per core from which the user is warned
MAX_STEP = 2.5  # seconds
_OWN_KEYS = {"seconds", "compare_to", "row", "rounds", "out"}  # those that are not of the training


def main(argv: list[str]) -> None:
    """Run the command."""
    config = load_config("bench", argv, BenchConfig)
    configs = [config]
    if own := sorted({_key(override) for override in config.compare_to} & _OWN_KEYS):
        raise UserError(f"compare_to={config.compare_to}: {', '.join(own)} apply to both; give keys of the training")
    if config.compare_to:
        changed = {_key(override) for override in config.compare_to}
        kept = [override for override in argv if _key(override) not in changed | {"compare_to"}]
        configs.append(load_config("bench", [*kept, *config.compare_to], BenchConfig))
    bench(configs)


def bench(configs: list[BenchConfig]) -> None:
    """Measure one configuration, or two in turn; print the results and write them to a JSON file.

    Raises:
        UserError: A configuration or its images are not valid; nothing is measured then.
    """
    silence_lightning()
    config = configs[0]
    for each in configs:
        if each.trainer.devices * each.trainer.num_nodes > 1:
            raise UserError("trainer.devices and trainer.num_nodes: bench measures a single process, set both to 1")
    if config.out.exists() and not config.out.is_file():
        raise UserError(f"out={config.out} is not a file; choose the path of a JSON file")
    check_outputs([config.out], "bench", inputs={})
    with TemporaryDirectory(prefix="ssl-vit-bench-") as name:
        directory = Path(name)
        runs, descriptions = [], []
        skipped = SkippedImageLog(directory / "skipped_images.txt")
        for number, each in enumerate(configs):
            each, dataset, description = load_images(each, directory / str(number))
            runs.append(BenchmarkRun(each, dataset, skipped, seconds=config.seconds))
            descriptions.append(description)
        environment = machine(runs[0].device)
        results, comparison = measure(runs, config)
        num_skipped = skipped.count()

    print(f"{pluralize(environment['threads'], 'thread')} of {environment['cpu']}, on {environment['device']}")
    if (environment["load"] or 0) > BUSY * environment["cores"]:
        print(
            f"Other processes had a load of {environment['load']:.1f} on {environment['cores']} cores: results are low"
        )
    for letter, result, description, original in zip("AB", results, descriptions, configs, strict=False):
        size, requested = result.config.data.batch_size, original.data.batch_size
        reduced = "" if size == requested else f" instead of {requested}, to keep steps short"
        prefix = f"{letter}: " if comparison else ""
        print(f"\n{prefix}{describe(result.config)}, batch {size}{reduced}, {result.model.precision}")
        print(f"images: {description}\n\n{format_result(result)}")
    print(f"\n{comparison or bottleneck(results[0], runs[0].device)}")
    if num_skipped:
        print(f"{pluralize(num_skipped, 'unreadable image')} skipped; list them with ssl-vit scan")
    record_outputs([config.out], "bench")
    write_json(config.out, to_json(results, comparison, descriptions, environment))
    print(f"All results: {config.out}")


def load_images(config: BenchConfig, directory: Path) -> tuple[BenchConfig, ImageDataset, str]:
    """Return the configuration with its images and their description; without `data.root`, generate photos."""
    if config.data.root is not None:
        dataset = build_dataset(config.data.source, config.data.root).with_range(config.data.range)
        return config, dataset, dataset.describe()
    if config.data.source != "folder":
        raise UserError(f"data.source={config.data.source}: set data.root to the path of the images")
    directory.mkdir()
    make_synthetic_photos(directory, num_images=NUM_PHOTOS, seed=config.seed)
    photos = build_dataset("folder", directory)
    from_disk = config.model_copy(update={"data": config.data.model_copy(update={"cache_gb": 0.0})})
    description = f"{NUM_PHOTOS} generated JPEG files of {WIDTH} x {HEIGHT}, read from disk; set data.root to your own"
    return from_disk, Subset(photos, torch.arange(NUM_PHOTOS).repeat(REPEATS)), description


def measure(runs: list[BenchmarkRun], config: BenchConfig) -> tuple[list[BenchmarkResult], Comparison | None]:
    """Measure all rows of one configuration, or one row of two configurations in turn."""
    models = [run.check() for run in runs]
    measure_peak = partial(measure_matmul, seconds=min(1.0, config.seconds))
    peaks = [measure_peak(run.device.type, model.precision) for run, model in zip(runs, models, strict=True)]
    log("largest batch")
    largest = min(run.largest_batch(MAX_STEP) for run in runs)
    for run in runs:
        run.shrink(largest)
    names, rounds = ([config.row], config.rounds) if config.compare_to else (list(ROWS), 1)
    rows: list[dict[str, list[Row]]] = [{name: [] for name in names} for _ in runs]
    for number in range(rounds):
        for letter, run, own_rows in zip("AB", runs, rows, strict=False):
            for name in names:
                log(f"{ROWS[name]}, {letter} of round {number + 1}" if config.compare_to else ROWS[name])
                own_rows[name].append(run.row(name))
    log("matmul peak")
    results = []
    for run, model, peak, own_rows in zip(runs, models, peaks, rows, strict=True):
        best = max(peak, measure_peak(run.device.type, model.precision))
        results.append(BenchmarkResult(run.config, model, best, own_rows))
    if not config.compare_to:
        return results, None
    first, second = (result.rows[config.row] for result in results)
    ratios = [b.images_per_s / a.images_per_s for a, b in zip(first, second, strict=True)]
    batch_sizes = [result.config.data.batch_size for result in results]
    return results, Comparison(config.row, config.compare_to, batch_sizes, ratios)


def log(name: str) -> None:
    """Print the name of the current measurement to stderr."""
    print(f"measuring: {name}", file=sys.stderr, flush=True)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
