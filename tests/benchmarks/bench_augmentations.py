"""Measure what views cost a core: a textbook's pipeline, ours, large photographs, small images in memory.

    python tools/bench_augmentations.py FOLDER

FOLDER holds photographs. Everything runs in one thread of one process; the ways of a table take turns, round by round.
Printed are CPU milliseconds per image (median over the rounds, smallest and largest in brackets) and ratios of the
medians. The large photographs are those of FOLDER, enlarged to 4000 x 3000 pixels, with the grain that a sensor gives
them, and saved as JPEGs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from PIL import Image, ImageChops
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.methods import ViewsConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.batch import Batch
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.loading.loader import MultiCropDataset
from ssl_vit.data.sources.decode import decode
from ssl_vit.data.sources.image_folder import ImageFolder, scan_image_folder
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.data.transforms.random_resized_crop import resolve_boxes, scale_boxes
from ssl_vit.runtime.rng import sample_keys
from tests.reference.augmentations import textbook_views

IMAGES, LARGE, SMALL = 60, 12, 256  # how many of each kind
BATCH = 20
GRAIN = 7  # standard deviation, of 255 levels
ROUNDS = 7


def main(folder: Path) -> None:
    """Three tables."""
    torch.set_num_threads(1)
    dataset = scan_image_folder(folder)
    views = views_of("backbone=vit_small")
    photographs(dataset, views)
    large(dataset, views)
    for side, local in ((32, 16), (48, 24), (96, 48)):
        small(side, views_of(f"method.views.global_crops.size={side}", f"method.views.local_crops.size={local}"))


def views_of(*words: str) -> ViewsConfig:
    """The shipped configuration's views."""
    return load_config("pretrain", ["data.root=.", "backbone.patch_size=8", *words], PretrainConfig).method.views


def photographs(dataset: ImageFolder, views: ViewsConfig) -> None:
    """A textbook's pipeline against the loading process's part and the photometric one."""
    places = torch.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).long()
    files = [dataset.path(i) for i in places.tolist()]
    photometric = ColorAugmentation(views)
    batches = cropped(dataset, places, views)

    def photometrics() -> None:
        for batch in batches:
            photometric(batch.global_views, batch.key)
            photometric(batch.local_views, batch.key, first_view=views.global_crops.count)

    times = in_turns(
        {
            "textbook (PIL, torchvision)": lambda: [textbook_views(file, views) for file in files],
            "ours: loading process": lambda: cropped(dataset, places, views),
            "  of which decoding": lambda: [decode(file) for file in files],
            "ours: photometric": photometrics,
        },
        len(files),
    )
    textbook, worker, _, light = (median(each) for each in times.values())
    show(f"{len(files)} photographs, {title(views)}", times)
    print(f"{'ours: both':<32}{worker + light:>9.2f} ms{1000 / (worker + light):>9.0f} images/s")
    print(f"a textbook costs {textbook / worker:.1f}x the loading process, {textbook / (worker + light):.1f}x both")


def large(dataset: ImageFolder, views: ViewsConfig) -> None:
    """Camera-sized JPEGs, decoded whole and no larger than the boxes need."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(min(LARGE, len(dataset))):
            photograph = Image.open(dataset.path(i)).convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)
            grain = Image.effect_noise(photograph.size, GRAIN).convert("RGB")
            ImageChops.add(photograph, grain, offset=-128).save(Path(folder, f"{i}.jpg"), quality=90)
        enlarged = scan_image_folder(Path(folder))
        places = torch.arange(len(enlarged))
        times = in_turns(
            {
                "decoded whole": lambda: cropped(enlarged, places, views, smaller=False),
                "decoded smaller": lambda: cropped(enlarged, places, views),
            },
            len(enlarged),
        )
        exact, moved = differences(enlarged, views)
        size = sum(enlarged.path(i).stat().st_size for i in range(len(enlarged))) / len(enlarged)
    show(f"{len(places)} JPEGs of 4000 x 3000, {size / 1e6:.1f} MB each", times)
    whole, smaller = map(median, times.values())
    print(f"decoded whole they cost {whole / smaller:.1f}x; values of the views differ")
    for what, levels in (("", exact), (" if both are cut at the smaller image's pixels", moved)):
        print(
            f"  by {levels.mean():.1f} of 255 on average, {levels.quantile(0.999):.0f} at the 99.9th percentile{what}"
        )


def differences(dataset: ImageFolder, views: ViewsConfig) -> tuple[Tensor, Tensor]:
    """Absolute differences of the views of images decoded smaller to those of whole ones: a sample of a million each.

    First to the views of the exact boxes, then to those whose edges lie where the smaller image's pixels end.
    """
    multicrop = MultiCrop(views)
    draws = multicrop.sample_params(sample_keys(0, 0, torch.arange(len(dataset))))
    exact, moved = [], []
    for i in range(len(dataset)):
        smaller, whole = ([torch.empty(3, size, size, dtype=torch.uint8) for size in multicrop.sizes] for _ in range(2))
        cut = multicrop.plan(draws, i)
        cut.crop_into(dataset.read(i, 3, cut.jpeg_scale), smaller)
        image = dataset.read(i, 3)
        height, width = image.shape[1:]
        multicrop.plan(draws, i).crop_into(image, whole)
        by = cut.jpeg_scale(height, width)
        boxes = torch.stack(scale_boxes(resolve_boxes(cut.draws, height, width), by)).T.tolist()
        for view, of_whole, (*box, flip) in zip(smaller, whole, boxes, strict=True):
            top, left, tall, wide = (side * by for side in box)
            size = list(view.shape[1:])
            there = resized_crop(image, top, left, tall, wide, size, InterpolationMode.BICUBIC, antialias=True)
            exact.append((view.float() - of_whole).abs().flatten())
            moved.append((view.float() - (there.flip(-1) if flip else there)).abs().flatten())
    every = -(-sum(map(len, exact)) // 1_000_000)
    return torch.cat(exact)[::every], torch.cat(moved)[::every]


def small(side: int, views: ViewsConfig) -> None:
    """Images in memory, cropped on the CPU as a GPU would and as a CPU does."""
    dataset = torch.randint(0, 256, (SMALL, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    keys = sample_keys(0, 0, torch.arange(SMALL))
    multicrop = MultiCrop(views)
    times = in_turns(
        {
            "as a GPU would": lambda: multicrop.crop_batch_matmul(
                dataset, resolve_boxes(multicrop.sample_params(keys), side, side)
            ),
            "as a CPU does": lambda: multicrop.crop_batch(dataset, keys),
        },
        SMALL,
    )
    show(f"{SMALL} images of {side} x {side} in memory, {title(views)}", times)


def title(views: ViewsConfig) -> str:
    """`2x224 + 8x96`."""
    return " + ".join(f"{kind.count}x{kind.size}" for kind in (views.global_crops, views.local_crops))


def cropped(dataset: ImageFolder, places: Tensor, views: ViewsConfig, *, smaller: bool = True) -> list[Batch]:
    """What a loading process makes of these images."""
    read = partial(dataset.read, channels=3) if smaller else lambda index, jpeg_scale: dataset.read(index, 3)
    skipped = SkippedImageLog(Path("/dev/null"))
    crops = MultiCropDataset(read, dataset.labels, channels=3, multicrop=MultiCrop(views), skipped=skipped)
    keys = sample_keys(0, 0, places)
    picks = list(zip(places.tolist(), keys.tolist(), strict=True))
    return [crops.__getitems__(picks[start : start + BATCH]) for start in range(0, len(picks), BATCH)]


def in_turns(ways: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """CPU milliseconds per image of each way in each round, behind one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + ROUNDS):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append((time.process_time() - start) / count * 1e3)
    return {name: each[1:] for name, each in times.items()}


def show(title: str, times: dict[str, list[float]]) -> None:
    """One table."""
    print(f"\n{title}")
    for name, each in times.items():
        typical = median(each)
        spread = f"({min(each):.2f} to {max(each):.2f})"
        print(f"{name:<32}{typical:>9.2f} ms{1000 / typical:>9.0f} images/s  {spread}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
