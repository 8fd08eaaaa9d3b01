"""What photometrics and SiT's corruption cost on a CPU, against their textbook forms. Prints times and ratios.

    python tools/bench_color_transforms.py PHOTOS [--threads 1 2] [--rounds 5]
    python tools/bench_color_transforms.py PHOTOS --place

PHOTOS is a folder of photographs. Both sides take turns; a ratio is the median over rounds, in brackets the least and
the greatest. With --place: whether loading num_workers or the main process should do the photometrics, in images per
second of decoding, cropping, photometrics and a step of known cost, with one worker and two threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.methods import ViewsConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.sources.decode import decode
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.corruption import Corruption
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.runtime.rng import sample_keys
from tests.helpers.crops import crop_image
from tests.reference.augmentations import corruption as textbook_corruption
from tests.reference.augmentations import photometric as textbook_photometric

IMAGES = 32
STEP_MS = 10  # per image, of the step of known cost


def seconds(run: Callable[[], object]) -> float:
    """CPU time with one thread, which other users of the machine disturb less; wall time with more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def compare(
    name: str, ours: Callable[[], object], textbook: Callable[[], object], *, rounds: int, dataset: int
) -> None:
    """Print a line of times and their ratio."""
    ours()
    times = [(seconds(ours), seconds(textbook)) for _ in range(rounds)]
    ratios = [theirs / own for own, theirs in times]
    each = (f"{1000 * median(side) / dataset:.2f}" for side in zip(*times, strict=True))
    print(f"{name}: {next(each)} ms per image, textbook {next(each)}, ratio ", end="")
    print(f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})", flush=True)


def figures(photos: Path, threads: int, rounds: int) -> None:
    """Print all comparisons for a number of threads."""
    torch.set_num_threads(threads)
    print(f"{threads} thread(s)")
    views, sit = (
        load_config("pretrain", ["data.root=.", f"method={name}"], PretrainConfig).method for name in ("dino", "sit")
    )
    kinds = Views(photos, views.views, IMAGES, inside=False)[list(range(IMAGES))]
    keys = sample_keys(0, 0, torch.arange(IMAGES))
    photometric, textbook = (
        ColorAugmentation(views.views),
        partial(textbook_photometric, views.views, dtype=torch.float32),
    )
    for name, kind, first in zip(("2 x 224", "8 x 96"), kinds, (0, 2), strict=True):
        ours, theirs = partial(photometric, kind, keys, first), partial(textbook, kind, keys, first)
        compare(f"photometrics {name}", ours, theirs, rounds=rounds, dataset=IMAGES)
    for count, size in ((64, 224), (512, 32)):
        x, keys = torch.randn(count, 3, size, size), sample_keys(0, 0, torch.arange(count))
        ours, theirs = (
            partial(of, x, keys, view=0)
            for of in (Corruption(sit.corruption), partial(textbook_corruption, sit.corruption))
        )
        compare(f"corruption {count} x {size}", ours, theirs, rounds=rounds, dataset=count)


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Batches of global and local views, by lists of places; normalized or, unless `inside`, uint8."""

    def __init__(self, photos: Path, views: ViewsConfig, count: int, *, inside: bool) -> None:
        files = sorted(file for file in photos.rglob("*") if file.is_file())
        self.files = [files[i % len(files)] for i in range(count)]
        self.crop, self.photometric, self.inside = MultiCrop(views), ColorAugmentation(views), inside

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, places: list[int]) -> tuple[Tensor, Tensor]:
        keys = sample_keys(0, 0, torch.tensor(places))
        views = [crop_image(self.crop, decode(self.files[place]), key) for place, key in zip(places, keys, strict=True)]
        both = tuple(torch.stack(kind) for kind in zip(*views, strict=True))
        return changed(self.photometric, both, keys) if self.inside else both


def changed(photometric: ColorAugmentation, both: tuple[Tensor, Tensor], keys: Tensor) -> tuple[Tensor, Tensor]:
    """Global and local views, normalized."""
    return photometric(both[0], keys), photometric(both[1], keys, both[0].shape[1])


def place(photos: Path, rounds: int) -> None:
    """Print images per second with photometrics in the main process, and in the worker."""
    torch.set_num_threads(2)
    views = load_config("pretrain", ["data.root=."], PretrainConfig).method.views
    photometric, batch, count = ColorAugmentation(views), 16, 128
    a = torch.randn(1024, 1024)
    products = max(1, round(STEP_MS * batch / 1000 / min(seconds(lambda: a @ a) for _ in range(50))))

    def epoch(*, inside: bool) -> float:
        batches = BatchSampler(SequentialSampler(range(count)), batch, drop_last=True)
        loader = DataLoader(
            Views(photos, views, count, inside=inside),
            batch_size=None,
            sampler=batches,
            num_workers=1,
            prefetch_factor=4,
        )
        start = time.perf_counter()
        for number, both in enumerate(loader):
            if not inside:
                changed(photometric, both, sample_keys(0, 0, torch.arange(number * batch, (number + 1) * batch)))
            for _ in range(products):
                a @ a
        return count / (time.perf_counter() - start)

    rates = [(epoch(inside=False), epoch(inside=True)) for _ in range(rounds)]
    main, worker = (median(side) for side in zip(*rates, strict=True))
    ratios = [each / other for each, other in rates]
    print(f"photometrics in the main process {main:.1f} images/s, in the worker {worker:.1f}, ratio ", end="")
    print(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", action="store_true")
    options = parser.parse_args()
    if options.place:
        place(options.photos, options.rounds)
    else:
        for threads in options.threads:
            figures(options.photos, threads, options.rounds)
