"""Record what the program computes, and compare two recordings number by number.

    python tools/record_behavior.py record OUT [--data DATA]
    python tools/record_behavior.py compare A B

`record` runs the commands of `COMMANDS` on one CPU thread inside of the new folder OUT and keeps all that they write,
in about three minutes. The package is the one that this Python imports; set PYTHONPATH to record another checkout. DATA
(default: SSL_VIT_DATA) is the folder of the archives, or the `data` folder of an earlier recording.

`compare` prints a row for each recorded thing and exits with 1 if anything differs by more than `TOLERANCES` allow.
Times, memory, settings, hashes, and texts in JSON files are not compared. Names that changed between two versions are
translated by the tables `RENAMED_*`, in both recordings.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

# --- what is run: every command and key of the program stands here ---

MODEL = "backbone=vit_cpu backbone.img_size=32 backbone.embed_dim=64 backbone.depth=2 backbone.num_heads=2"
SHORT = (
    "trainer=smoke trainer.accelerator=cpu trainer.max_steps=60 data.batch_size=16 data.num_workers=0 run.folder=runs"
)
DINO = (
    "method.views.local_crops.count=2 method.views.local_crops.size=24 method.head.prototypes=64"
    " method.head.hidden_dim=32 method.head.bottleneck_dim=16"
)
SIT = "method=sit"
UNWATCHED = "online.every_epochs=null image_logging.every_epochs=null"
WATCHED = (
    "online.every_epochs=1 online.train_images=200 online.val_images=50 online.k=[5,1]"
    " image_logging.every_epochs=1 image_logging.num_images=4"
)
FLOAT32, BFLOAT16 = "trainer.precision=32-true", "trainer.precision=bf16-mixed"
PRETRAIN = f"pretrain {MODEL} {SHORT} data.root=data/cifar/train"
FINETUNE = f"finetune {SHORT} checkpoint=runs/dino data.root=data/cifar validate_every_epochs=1"
LABELED = "data.root=data/cifar data.num_workers=0 data.batch_size=64"
LINEAR = f"linear {LABELED} checkpoint=runs/dino"

COMMANDS = {
    "dino": f"{PRETRAIN} {DINO} {WATCHED} {FLOAT32} run.name=dino",
    "dino-bf16": f"{PRETRAIN} {DINO} {UNWATCHED} {BFLOAT16} run.name=dino-bf16",
    "sit": f"{PRETRAIN} {SIT} {WATCHED} {FLOAT32} run.name=sit",
    "sit-bf16": f"{PRETRAIN} {SIT} {UNWATCHED} {BFLOAT16} run.name=sit-bf16",
    "finetune": f"{FINETUNE} {FLOAT32} run.name=finetune",
    "finetune-bf16": f"{FINETUNE} {BFLOAT16} run.name=finetune-bf16",
    "knn": f"knn {LABELED} checkpoint=runs/dino k=[5,10] out=results/knn.json",
    "logistic": f"{LINEAR} out=results/logistic.json",
    "ridge": f"{LINEAR} solver=ridge out=results/ridge.json",
    "sgd": f"{LINEAR} solver=sgd sgd.epochs=3 out=results/sgd.json",
    "protocol-dino": f"{LINEAR} protocol=dino epochs=2 out=results/protocol-dino.json",
    "protocol-sit": f"linear {LABELED} checkpoint=runs/sit protocol=sit epochs=2 out=results/protocol-sit.json",
    "fewshot": f"fewshot {LABELED} checkpoint=runs/dino shots=[1,5] shares=[0.1] subsets=3 out=results/fewshot.json",
    "features": f"features {LABELED} checkpoint=runs/dino to=npz out=results/features.npz",
    "transfer": "transfer checkpoints=[runs/dino,runs/sit] data.roots=[data/cifar] data.num_workers=0"
    " linear=[blocks=[1]] out=results/transfer",
    "neighbors": f"neighbors {LABELED} checkpoint=runs/dino limit=6 out=results/neighbors.png",
    "attention": "attention checkpoint=runs/dino images=data/ecssd/images masks=data/ecssd/masks max_side=128"
    " methods=[attention,lost,tokencut,pca,found] out=results/attention",
    "propagate": "propagate checkpoint=runs/dino davis=data/davis side=96 radius=3 temperature=0.03"
    " out=results/propagate",
    "inspect": "inspect checkpoint=runs/dino compare_to=runs/sit limit=32 out=results/inspect",
    "report": f"report {LABELED} run=runs/dino inspect=false images=data/ecssd/images masks=data/ecssd/masks limit=4"
    " max_side=96 out=results/report.html",
}

# Batches as the model gets them: of images of one size, which stay in memory, and of photographs, read from disk.
VIEWS = {
    "dino-cifar": f"{MODEL} {SHORT} {DINO} data.root=data/cifar/train",
    "dino-ecssd": f"{MODEL} {SHORT} {DINO} data.root=data/ecssd/images data.cache_gb=0 backbone.img_size=48",
    "sit-cifar": f"{MODEL} {SHORT} {SIT} data.root=data/cifar/train",
    "sit-ecssd": f"{MODEL} {SHORT} {SIT} data.root=data/ecssd/images data.cache_gb=0 backbone.img_size=48",
}
BATCHES = 3


def views_of(overrides: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the first batches of `ssl-vit pretrain` with these overrides: the one place that imports the program."""
    from ssl_vit.commands.load_config import load_config
    from ssl_vit.config.pretrain import PretrainConfig
    from ssl_vit.data.dataset import SkippedImageLog
    from ssl_vit.data.dataset_factory import build_dataset
    from ssl_vit.data.loading.loader import build_train_loader
    from ssl_vit.data.transforms.multicrop import MultiCrop
    from ssl_vit.methods.schedules import make_plan
    from ssl_vit.training.trainer import build_method

    config = load_config("pretrain", overrides, PretrainConfig)
    dataset = build_dataset(config.data.source, config.data.root)
    method = build_method(config, make_plan(config, len(dataset)))
    place = {"rank": 0, "world": 1, "accumulate": 1, "first_step": 0, "channels": config.backbone.in_chans}
    skipped = SkippedImageLog(Path("skipped_images.txt"))
    multicrop = MultiCrop(config.method.views)
    loader = build_train_loader(dataset, multicrop, config.data, seed=config.seed, skipped=skipped, **place)
    for batch in islice(loader, BATCHES):
        seen = {"global": batch.global_views, "local": batch.local_views, "index": batch.index, "key": batch.key}
        seen["global float"] = method.color_augmentation(batch.global_views, batch.key)
        if batch.local_views.shape[1]:
            first = batch.global_views.shape[1]
            seen["local float"] = method.color_augmentation(batch.local_views, batch.key, first_view=first)
        if (pretext := method.pretext_views(config.method, seen["global float"], batch.key)) is not None:
            seen |= {"turned": pretext.target, "quarter turns": pretext.quarter}
            seen |= {"corrupted": pretext.corrupted, "mask": pretext.mask}
        yield seen


# --- what is compared ---

# Names of version 0.1 (regular expressions) and those of today; both recordings are translated.
RENAMED_FILES: dict[str, str] = {  # parts of paths inside of OUT
    r"/panels/": "/images/",
    r"pictures\.safetensors": "image_list.safetensors",
    r"/origin\.json": "/source.json",
    r"/sheet\.jpg": "/overview.jpg",
    r"-seed(\d+)/state\.pt": r"-seed\1/checkpoints/last.ckpt",  # published linear probes
}
RENAMED_COLUMNS: dict[str, str] = {  # of metrics.csv and other tables
    "^train/spread$": "train/feature_std",
    "^train/information$": "train/assignment_mutual_information",
    "^held_out/": "val/",
    "^by$": "tracker",
}
RENAMED_FIELDS: dict[str, str] = {  # parts of places in JSON files (score/metrics/0/low) and names of arrays
    "^data/pictures$": "data/num_images",
    "^data/frames$": "data/num_frames",
    "^data/n$": "images/count",
    "picture": "image",
    "network": "model",
    "normalis": "normaliz",
    "neighbour": "neighbor",
    "labelled": "labeled",
    "centre": "center",
    "/place$": "/indices",
    "/truth$": "/target",
    "/soft$": "/score_map",
    "^parts$": "splits",
    "/confused/": "/confusions/",
    "/trials/": "/candidates/",
    "/own$": "/in_domain",
    "^division/learned": "splits/train",
    "^division/held_out": "splits/val",
    "^division/tested": "splits/test",
    "^data/skipped$": "images/skipped",
    "^measured/": "statistics/",
    "/lines/information/": "/lines/mutual information/",
    "/lines/spread/": "/lines/feature std/",
    "^attended/": "gallery/",
    "^segmented/": "masks/",
    "^feature_map/": "embedding_map/",
    "^mass$": "attention_mass",
    "^verdicts/": "health_warnings/",
}
RENAMED_WEIGHTS: dict[str, str] = {}  # of checkpoints; where names still differ, tensors are compared in their order

COMPARED = {".ckpt", ".pt", ".safetensors", ".csv", ".json", ".jsonl", ".npz", ".png", ".jpg"}
# The images, the program's own store of features (results/features.npz holds the same; its folders carry the times
# of files), copies of results, and the checkpoint before the last, which depends on how long an epoch took.
IGNORED_FILES = re.compile(
    r"^(data|cache|logs)/|/eval/features/|history\.jsonl$|previous\.ckpt$|-seed\d+/protocol\.json$"
)
# Images with text in them: differences are shown, but are none of the numbers.
DRAWN = re.compile(r"\.(png|jpg)$")
PIXELS = re.compile(r"/(masks|overlays)/")
IGNORED_NAMES = re.compile(
    r"(^|/)(config|protocol|environment|tool|package|cost|seconds|schema|id|created|identity)(/|$)|^speed/|^tracker$"
    r"|^curves/\d+/lines/training/"  # images/s on the page of `report`
    # The page shows more curves than that of 0.1, and classes and heads of its images in another form.
    r"|^curves/\d+/lines/(uniformity|alignment|teacher distance|center norm)/|^gallery/\d+/heads$|/same_class$"
)
# Largest allowed differences by name; all else is compared exactly.
TOLERANCES = ((re.compile(r"(^|/)(low|high)$"), 1e-8),)

Arrays = dict[str, np.ndarray]


def record(out: Path, data: Path) -> int:
    """Run all commands inside of a new folder, and return the exit code."""
    out.mkdir(parents=True)
    out = out.resolve()
    print(f"package: {importlib.util.find_spec('ssl_vit').origin}", flush=True)
    prepare(data, out / "data")
    one_thread = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(out / "cache")}
    jobs = {name: ["-m", "ssl_vit", *words.split()] for name, words in COMMANDS.items()}
    jobs |= {f"views-{name}": [str(Path(__file__).resolve()), "views", name] for name in VIEWS}
    for folder in ("logs", "results", "views"):
        (out / folder).mkdir()
    failed = []
    for name, words in jobs.items():
        start, log = time.perf_counter(), out / "logs" / f"{name}.txt"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, *words], cwd=out, env=os.environ | one_thread, stdout=file, stderr=subprocess.STDOUT
            )
        print(f"{name:<16}{time.perf_counter() - start:>6.1f} s", flush=True)
        if done.returncode:
            failed.append(name)
            print("\n".join(log.read_text(encoding="utf-8").splitlines()[-5:]), flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"recorded {len(jobs)} things in {out}")
    return int(bool(failed))


def record_views(name: str) -> None:
    """Write the batches of one entry of `VIEWS` into `views/` of the current folder."""
    batches = enumerate(views_of(VIEWS[name].split()))
    np.savez(f"views/{name}.npz", **{f"{at} {key}": x.numpy() for at, batch in batches for key, x in batch.items()})


def prepare(source: Path, data: Path) -> None:
    """Make small sets of CIFAR-10, ECSSD and two made-up videos, or copy those of an earlier recording."""
    if (source / "cifar").is_dir():
        shutil.copytree(source, data)
        return
    taken: Counter[Path] = Counter()
    with tarfile.open(source / "cifar10.tar.xz") as archive:
        for member in archive:
            place = Path(member.name).parent  # <split>/<class>
            if member.isfile() and taken[place] < {"train": 60, "test": 20}[place.parent.name]:
                taken[place] += 1
                archive.extract(member, data / "cifar", filter="data")
    with tarfile.open(source / "ecssd300.tar") as archive:
        files = sorted((member for member in archive if member.isfile()), key=lambda member: member.name)
        chosen = sorted({Path(member.name).stem for member in files})[:20]
        archive.extractall(data, [member for member in files if Path(member.name).stem in chosen], filter="data")
    (data / "ecssd300").rename(data / "ecssd")
    lists = data / "davis" / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("nine\nseven\n")
    for name, frames in {"nine": 9, "seven": 7}.items():
        moving_squares(data / "davis", name, frames)


def moving_squares(davis: Path, name: str, frames: int) -> None:
    """Draw a red and a green square that move over gray noise, in the layout of DAVIS."""
    images, masks = (davis / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    ground = np.random.default_rng(0).integers(90, 130, (96, 160, 1), dtype=np.uint8).repeat(3, axis=2)
    for frame in range(frames):
        pixels, mask = ground.copy(), np.zeros((96, 160), dtype=np.uint8)
        for number, color in enumerate([(230, 30, 30), (30, 220, 40)], start=1):
            top, left = 40 * number - 28, 8 * frame + 10 * number
            pixels[top : top + 32, left : left + 32] = color
            mask[top : top + 32, left : left + 32] = number
        Image.fromarray(pixels).save(images / f"{frame:05d}.jpg", quality=95)
        Image.fromarray(mask).save(masks / f"{frame:05d}.png")


def compare(first: Path, second: Path) -> int:
    """Print a row for each recorded thing, and return the exit code."""
    ours, theirs = things(first), things(second)
    names = sorted(ours.keys() | theirs.keys())
    failures = total = 0
    for thing in names:
        if thing in ours and thing in theirs:
            values, finding, failed = compared(thing, arrays_of(ours[thing]), arrays_of(theirs[thing]))
        else:
            values, finding, failed = 0, f"only in {first if thing in ours else second}", counts(thing)
        print(f"{'DIFFERS' if failed else 'ok':<8}{thing:<52}{values:>10,}  {finding}")
        failures, total = failures + failed, total + values
    print(f"\n{len(names)} things, {total:,} values: {failures} differ")
    return int(failures > 0 or not names)


def things(recording: Path) -> dict[str, dict[str, Path]]:
    """List the recorded files: by thing, which is a file or all numbered files of a folder, and by translated name."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted(recording.rglob("*")):
        name = path.relative_to(recording).as_posix()
        if path.suffix in COMPARED and not IGNORED_FILES.search(name):
            new = Path(translated(name, RENAMED_FILES))
            thing = new.with_name(f"*{new.suffix}") if new.stem.isdecimal() else new
            found[thing.as_posix()][new.name] = path
    return found


def arrays_of(files: dict[str, Path]) -> Arrays:
    """Read the numbers of one thing."""
    several = len(files) > 1
    return {
        f"{file}: {name}" if several else name: np.asarray(value)
        for file, path in files.items()
        for name, value in numbers(path)
        if not IGNORED_NAMES.search(name)
    }


def numbers(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what a file holds by its translated name."""
    if path.suffix in (".ckpt", ".pt"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if path.name == "state.pt":  # a published linear probe of version 0.1
            heads = {f"heads.{name}": value for name, value in content["heads"].items()}
            content = {"state_dict": heads, "optimizer_states": [content["optimizer"]]}
        kept = ("state_dict", "optimizer_states", "epoch", "global_step")
        if "-seed" in path.as_posix():
            kept = kept[:2]
        content = {key: content[key] for key in kept}
        yield from flat("", content, RENAMED_WEIGHTS)
    elif path.suffix == ".safetensors":
        yield from flat("", safetensors.torch.load_file(path), RENAMED_WEIGHTS)
    elif path.suffix == ".npz":
        with np.load(path) as content:
            yield from ((translated(name, RENAMED_FIELDS), content[name]) for name in content.files)
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for column in rows[0] if rows else []:
            cells = np.array([row[column] or "nan" for row in rows])
            with suppress(ValueError):  # a column of texts
                cells = cells.astype(np.float64)
            yield translated(column, RENAMED_COLUMNS), cells
    elif path.suffix in (".json", ".jsonl"):
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        yield from flat("", content, RENAMED_FIELDS)
    else:
        with Image.open(path) as image:
            yield "pixels", np.array(image)


def flat(place: str, value: object, renamed: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield all tensors and numbers inside of nested dictionaries and lists, by their places."""
    if isinstance(value, torch.Tensor):
        yield translated(place, renamed), value.numpy()
    elif isinstance(value, (bool, int, float)):
        yield translated(place, renamed), np.float64(value)
    elif isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(f"{place}/{key}" if place else str(key), inner, renamed)


def translated(name: str, renamed: dict[str, str]) -> str:
    """Return the name of today."""
    for old, new in renamed.items():
        name = re.sub(old, new, name)
    return name


def counts(thing: str) -> bool:
    """Tell whether a thing consists of numbers alone, not of text drawn into an image."""
    return not DRAWN.search(thing) or bool(PIXELS.search(thing))


def compared(thing: str, ours: Arrays, theirs: Arrays) -> tuple[int, str, bool]:
    """Compare one thing array by array: how many values, what was found, and whether that is a failure."""
    notes = []
    if ours.keys() != theirs.keys() and thing.endswith(".ckpt") and len(ours) == len(theirs):
        notes.append(f"{len(ours.keys() - theirs.keys())} renamed, compared in order")
        theirs = dict(zip(ours, theirs.values(), strict=True))
    if odd := sorted(ours.keys() ^ theirs.keys()):
        notes.append(f"{len(odd)} names in one alone: {', '.join(odd[:3])}")
    common = [name for name in ours if name in theirs]
    gaps = {name: difference(ours[name], theirs[name]) for name in common}
    beyond = [name for name in common if gaps[name] > tolerance(name)]
    if all(identical(ours[name], theirs[name]) for name in common):
        notes.insert(0, "equal bit for bit")
    else:
        worst = max(beyond or common, key=gaps.__getitem__)
        notes.insert(0, f"largest difference {gaps[worst]:.3g} in {worst}, {len(beyond)} beyond tolerance")
        if not counts(thing):
            notes.append("drawn, not counted")
    return sum(ours[name].size for name in common), "; ".join(notes), counts(thing) and bool(odd or beyond)


def identical(x: np.ndarray, y: np.ndarray) -> bool:
    """Tell whether two arrays have the same type, shape and bits."""
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def difference(x: np.ndarray, y: np.ndarray) -> float:
    """Return the largest difference of two arrays; infinite for texts, shapes and missing values that differ."""
    if identical(x, y):
        return 0.0
    if x.shape != y.shape or x.dtype.kind not in "biuf" or y.dtype.kind not in "biuf":
        return float("inf")
    x, y = x.astype(np.float64), y.astype(np.float64)
    gap = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
    return float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max(initial=0.0))


def tolerance(name: str) -> float:
    """Return by how much the values of a name may differ."""
    return next((allowed for pattern, allowed in TOLERANCES if pattern.search(name)), 0.0)


def main() -> int:
    """Read the words, and return the exit code."""
    parser = argparse.ArgumentParser(description="Record what the program computes, and compare two recordings.")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run all commands inside of a new folder")
    recording.add_argument("out", type=Path)
    data = os.environ.get("SSL_VIT_DATA")
    recording.add_argument("--data", type=Path, default=data, help="folder of the archives, or of prepared data")
    views = commands.add_parser("views", help="write one entry of VIEWS; `record` calls it")
    views.add_argument("name", choices=VIEWS)
    comparison = commands.add_parser("compare", help="print a row for each recorded thing")
    comparison.add_argument("recordings", type=Path, nargs=2)
    words = parser.parse_args()
    if words.command == "compare":
        return compare(*words.recordings)
    if words.command == "views":
        record_views(words.name)
        return 0
    if words.data is None:
        parser.error("set the images with --data, or set SSL_VIT_DATA")
    return record(words.out, words.data)


if __name__ == "__main__":
    sys.exit(main())
