"""`ssl-vit bench`: how fast a configuration trains on this machine, where the time goes, and how two compare.

ssl-vit bench
ssl-vit bench data.root=photos backbone=vit_small method=sit
ssl-vit bench data.root=photos 'compare_to=[trainer.precision=32-true]'
"""

from __future__ import annotations

import sys
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
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.benchmark import BenchmarkRun, Row
from ssl_vit.training.benchmark_report import (
    ROWS,
    Comparison,
    Measured,
    as_values,
    bottleneck,
    describe,
    machine,
    table,
)
from ssl_vit.training.trainer import silence_lightning

PHOTOS = 128  # that are made where there are none
EPOCH = 10_000  # times that each of them comes in an epoch: those of a large data set are long
BUSY = 0.5  # of the cores, from which on other work is told of
STEP = 2.5  # seconds that a step may take
_OWN = {"seconds", "compare_to", "row", "rounds", "out"}  # keys of bench itself


def main(words: list[str]) -> None:
    """Run the command."""
    config = load_config("bench", words, BenchConfig)
    configs = [config]
    if own := sorted({_key(word) for word in config.compare_to} & _OWN):
        raise UserError(f"compare_to={config.compare_to}: {', '.join(own)} count for both; name keys of the training")
    if config.compare_to:
        changed = {_key(word) for word in config.compare_to}
        kept = [word for word in words if _key(word) not in changed | {"compare_to"}]
        configs.append(load_config("bench", [*kept, *config.compare_to], BenchConfig))
    bench(configs)


def bench(configs: list[BenchConfig]) -> None:
    """Measure one configuration, or two in turn, print what was found and write it down.

    Raises:
        UserError: Of a configuration or its images, before anything is measured.
    """
    silence_lightning()
    config = configs[0]
    for each in configs:
        if each.trainer.devices * each.trainer.num_nodes > 1:
            raise UserError("trainer.devices and trainer.num_nodes: bench measures a single process, set both to 1")
    if config.out.exists() and not config.out.is_file():
        raise UserError(f"out={config.out} is no file; name one")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="ssl-vit-bench-") as name:
        folder = Path(name)
        subjects, described = [], []
        skipped = SkippedImageLog(folder / "skipped_images.txt")
        for number, each in enumerate(configs):
            each, dataset, said = with_images(each, folder / str(number))
            subjects.append(BenchmarkRun(each, dataset, skipped, seconds=config.seconds))
            described.append(said)
        environment = machine(subjects[0].device)
        found, comparison = measure(subjects, config)
        count = skipped.count()

    print(f"{pluralize(environment['threads'], 'thread')} of {environment['cpu']}, on {environment['device']}")
    if (environment["load"] or 0) > BUSY * environment["cores"]:
        print(
            f"Other work had a load of {environment['load']:.1f} on {environment['cores']} cores: the figures are low"
        )
    for letter, subject, images_said, original in zip("AB", found, described, configs, strict=False):
        print(f"\n{letter + ': ' if comparison else ''}{describe(subject.config)}, {describe_batch(subject, original)}")
        print(f"images: {images_said}\n\n{table(subject)}")
    print(f"\n{comparison or bottleneck(found[0], subjects[0].device)}")
    if count:
        print(f"{pluralize(count, 'image')} could not be read and left out; ssl-vit scan names them")
    write_json(config.out, as_values(found, comparison, described, environment))
    print(f"Everything: {config.out}")


def with_images(config: BenchConfig, folder: Path) -> tuple[BenchConfig, ImageDataset, str]:
    """The configuration's images, or some made in `folder` that stand for many files on a disk, and words on them."""
    if config.data.root is not None:
        dataset = build_dataset(config.data.source, config.data.root)
        return config, dataset, dataset.describe()
    if config.data.source != "folder":
        raise UserError(f"data.source={config.data.source}: name the place of the images with data.root")
    folder.mkdir()
    make_synthetic_photos(folder, num_images=PHOTOS, seed=config.seed)
    made = build_dataset("folder", folder)
    from_disk = config.model_copy(update={"data": config.data.model_copy(update={"cache_gb": 0.0})})
    said = f"{PHOTOS} JPEG files of {WIDTH} x {HEIGHT}, made for this and read from disk; name your own with data.root"
    return from_disk, Subset(made, torch.arange(PHOTOS).repeat(EPOCH)), said


def measure(subjects: list[BenchmarkRun], config: BenchConfig) -> tuple[list[Measured], Comparison | None]:
    """All three rows of a configuration, or one row of two configurations in turn."""
    models = [subject.check() for subject in subjects]
    peaks = [matmul(subject, model.precision) for subject, model in zip(subjects, models, strict=True)]
    log("how many images a step can have")
    possible = [subject.largest_batch(STEP) for subject in subjects]
    for subject in subjects:
        subject.shrink(min(possible))
    names, rounds = ([config.row], config.rounds) if config.compare_to else (list(ROWS), 1)
    rows: list[dict[str, list[Row]]] = [{name: [] for name in names} for _ in subjects]
    for turn in range(rounds):
        for letter, subject, measured in zip("AB", subjects, rows, strict=False):
            for name in names:
                log(f"{ROWS[name]}, {letter} of round {turn + 1}" if config.compare_to else ROWS[name])
                measured[name].append(subject.row(name))
    log("matmul peak")
    found = []
    for subject, model, peak, own in zip(subjects, models, peaks, rows, strict=True):
        best = max(peak, matmul(subject, model.precision))
        found.append(Measured(subject.config, model, best, own))
    if not config.compare_to:
        return found, None
    first, second = (subject.rows[config.row] for subject in found)
    ratios = [b.images_per_s / a.images_per_s for a, b in zip(first, second, strict=True)]
    batch_sizes = [subject.config.data.batch_size for subject in found]
    return found, Comparison(config.row, config.compare_to, batch_sizes, ratios)


def matmul(subject: BenchmarkRun, precision: str) -> float:
    """FLOP/s of a matrix product now."""
    return measure_matmul(subject.device.type, precision, seconds=min(1.0, subject.seconds))


def describe_batch(subject: Measured, original: BenchConfig) -> str:
    """How many images a step had, and why not all."""
    size, wanted = subject.config.data.batch_size, original.data.batch_size
    said = f"batch {size}" if size == wanted else f"batch {size} instead of {wanted} so that steps are short"
    return f"{said}, {subject.model.precision}"


def log(what: str) -> None:
    """Say what is being measured."""
    print(f"measuring: {what}", file=sys.stderr, flush=True)


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
