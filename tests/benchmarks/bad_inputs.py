"""Make bad and unusual inputs, run the commands on each, and print what happened as a Markdown table.

    python -m tests.benchmarks.bad_inputs > table.md

Each command runs in a process of its own, forked from this one so that torch is imported once. A training is one of two
steps on a few good images beside the bad one. The exit code of this program is the number of tracebacks, lost runs,
wrong values and pieces of code that ran.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ssl_vit.cli import main as ssl_vit
from ssl_vit.data.dataset import escape_path
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.export import export_backbone
from tests.conftest import SHRUNK, SHRUNK_DINO
from tests.models.test_backbone import tiny
from tests.reference.bad_files import CHECKPOINTS, CONFIGS, RECIPES, SAFETENSORS, SIDECARS, Mark
from tests.reference.bad_images import BROKEN, NAMES, READABLE, image, put_hostile

OVERRIDES = [*SHRUNK, *SHRUNK_DINO, "data.batch_size=8", "trainer.max_steps=2"]
TIMEOUT = 120.0  # seconds


class Outcome(NamedTuple):
    """What a command did."""

    code: int | None  # None: it had to be stopped
    text: str  # standard output and error


class Row(NamedTuple):
    """One line of the table."""

    kind: str
    name: str
    code: int | None
    what: str
    bad: bool  # a traceback, a lost run, or code that ran


def run(argv: list[str]) -> Outcome:
    """Run `ssl-vit` with these arguments in a process of its own."""
    with tempfile.NamedTemporaryFile() as output:
        process = multiprocessing.get_context("fork").Process(target=_run, args=(argv, output.fileno()))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
            return Outcome(None, "stopped: it hung")
        return Outcome(process.exitcode, Path(output.name).read_text(encoding="utf-8", errors="backslashreplace"))


def _run(argv: list[str], output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(ssl_vit(argv))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder, deleted afterwards."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def train(folder: Path, *argv: str) -> tuple[Outcome, str]:
    """Train on the images in `folder`; what was skipped comes too."""
    outcome = run(["pretrain", *OVERRIDES, f"data.root={folder / 'p'}", f"run.folder={folder / 'runs'}", *argv])
    skipped = folder / "runs" / "dino" / "skipped_images.txt"
    return outcome, skipped.read_text(encoding="utf-8") if skipped.exists() else ""


def dataset() -> Iterator[Row]:
    """Each bad image among good ones, then all together."""
    names = {**{os.fsencode(name): make for name, make in READABLE.items()}}
    names |= {os.fsencode(name): make for name, (make, _) in BROKEN.items()}
    names |= dict.fromkeys(NAMES, READABLE["jpeg_called.png"])
    for name, make in names.items():
        with scratch() as folder:
            (folder / "p").mkdir()
            for i in range(8):
                image(seed=i).save(folder / "p" / f"good{i}.png")
            make(folder / "p" / os.fsdecode(name))
            outcome, skipped = train(folder)
            what = f"skipped: {skipped.strip().partition(chr(9))[2]}" if skipped else "read"
            kind = "name" if name in NAMES else "image"
            yield row(kind, escape_path(name), outcome, what, good=outcome.code == 0)
    with scratch() as folder:
        (folder / "p").mkdir()
        broken = put_hostile(folder / "p")
        outcome, skipped = train(folder, "trainer.max_steps=30")
        what = f"{len(skipped.splitlines())} of {len(broken)} broken ones named, trained"
        yield row("folder", "all of these at once", outcome, what, good=outcome.code == 0)


def files() -> Iterator[Row]:
    """Each hostile checkpoint, safetensors file, JSON, recipe and config.yaml."""
    with scratch() as folder:
        export_backbone(Backbone(tiny()), folder / "x.safetensors", mean=[0.5] * 3, std=[0.2] * 3, source="")
        good, sidecar = (folder / "x.safetensors").read_bytes(), json.loads((folder / "x.json").read_text())
    export = ["export", "checkpoint={0}/x.ckpt", "out={0}/o.safetensors"]
    for name, checkpoint in CHECKPOINTS.items():
        with scratch() as folder:
            checkpoint(folder / "x.ckpt", Mark(folder / "ran"))
            yield refused("checkpoint", name, folder, export)
    export = [export[0], "checkpoint={0}/x.safetensors", export[2]]
    for name, safetensors in SAFETENSORS.items():
        with scratch() as folder:
            (folder / "x.safetensors").write_bytes(safetensors(good, Mark(folder / "ran")))
            (folder / "x.json").write_text(json.dumps(sidecar))
            yield refused("safetensors", name, folder, export)
    for name, beside in SIDECARS.items():
        with scratch() as folder:
            (folder / "x.safetensors").write_bytes(good)
            (folder / "x.json").write_text(beside(sidecar, Mark(folder / "ran")))
            yield refused("JSON beside it", name, folder, export)
    for name, recipe in RECIPES.items():
        with scratch() as folder:
            (folder / "recipes").mkdir()
            (folder / "recipes" / "evil.yaml").write_bytes(recipe(Mark(folder / "ran")))
            yield refused("recipe", name, folder, ["pretrain", "data.root=x", "recipe=evil", "--config-dir={0}"])


def run_folders() -> Iterator[Row]:
    """A run whose config.yaml was replaced."""
    with scratch() as folder:
        (folder / "p").mkdir()
        for i in range(8):
            image(seed=i).save(folder / "p" / f"{i}.png")
        train(folder)
        argv = ["pretrain", *OVERRIDES, "data.root={0}/p", "run.folder={0}/runs", "run.resume=true"]
        for name, config in CONFIGS.items():
            (folder / "runs" / "dino" / "config.yaml").write_text(config(Mark(folder / "ran")))
            yield refused("config.yaml of a run", name, folder, argv)


def splits() -> Iterator[Row]:
    """Three separable classes under every pair of names of splits score 100; unclear folders are refused."""
    pairs = [("train", "val"), ("train", "valid"), ("Train", "Test"), ("training_set", "test_set"), ("trn", "dev")]
    unclear = [("train", "val", "test"), ("train", "extra"), ("fold1", "fold2"), ("train", "test", "cat")]
    for folders in [*pairs, *unclear]:
        with scratch() as folder:
            for part in folders:
                for label, name in enumerate("abc"):
                    (folder / "data" / part / name).mkdir(parents=True)
                    for number in range(6):
                        noise = np.random.default_rng(number).integers(0, 60, (16, 16, 3), dtype=np.uint8)
                        noise[..., label] += 190
                        Image.fromarray(noise).save(folder / "data" / part / name / f"{number}.png")
            argv = [f"data.root={folder / 'data'}", f"out={folder / 'r.json'}", "k=[1]", "baselines=false"]
            outcome = run(["knn", "checkpoint=random:vit_tiny_patch16_224", "data.image_size=32", *argv])
            good, what = outcome.code == 2, outcome.text.strip()[-160:]
            if folders in pairs and outcome.code == 0:
                score = json.loads((folder / "r.json").read_text())["score"]["metrics"][0]["value"]
                good, what = score == 1, f"top-1 {score:.0%}"
            yield row(
                "split folders",
                " ".join(folders),
                outcome,
                what,
                good=good and (outcome.code == 0) == (folders in pairs),
            )


def masks() -> Iterator[Row]:
    """The same mask in every coding gives the IoU of the patch ceiling, which depends on the masks alone."""
    inside = np.zeros((48, 64), bool)
    inside[10:33, 15:50] = True
    alpha = Image.new("RGBA", (64, 48), "white")
    alpha.putalpha(Image.fromarray(inside.astype(np.uint8) * 255))
    codings = {
        "0/255": Image.fromarray(inside.astype(np.uint8) * 255),
        "0/1": Image.fromarray(inside.astype(np.uint8)),
        "1/2": Image.fromarray(inside.astype(np.uint8) + 1),
        "1 bit": Image.fromarray(inside),
        "uint16": Image.fromarray(inside.astype(np.uint16) * 1000),
        "colors": Image.fromarray((inside[..., None] * np.array([200, 0, 0])).astype(np.uint8)),
        "alpha": alpha,
        "soft edges": Image.fromarray((inside * 250 + np.roll(inside, 1, 1) * 5).astype(np.uint8)),
        "trimap": Image.fromarray(np.where(inside, 1, np.where(np.roll(inside, 2, 1), 3, 2)).astype(np.uint8)),
    }
    expected = None
    for name, mask in codings.items():
        with scratch() as folder:
            for part in ("images", "masks"):
                (folder / part).mkdir()
            for number in range(2):
                image(seed=number).resize((64, 48)).save(folder / "images" / f"{number}.jpg")
                mask.save(folder / "masks" / f"{number}.png")
            argv = [f"{part}={folder / part}" for part in ("images", "masks", "out")]
            outcome = run(["attention", "checkpoint=random:vit_tiny_patch16_224", "baselines=false", *argv])
            if name == "trimap":
                yield row("mask", name, outcome, outcome.text.strip()[-200:], good=outcome.code == 2)
                continue
            found = None
            if outcome.code == 0:
                baselines = json.loads((folder / "out" / "summary.json").read_text())["baselines"]
                found = [metric["value"] for score in baselines for metric in score["metrics"]]
            expected = expected or found
            yield row("mask", name, outcome, "scored as 0/255 is", good=outcome.code == 0 and found == expected)


def outputs() -> Iterator[Row]:
    """Inputs below the output folder stay as they are."""
    for kind in ("maps", "masks", "overlays", "heads"):
        with scratch() as folder:
            (folder / kind).mkdir()
            image(seed=0).save(folder / kind / "a.jpg")
            before = (folder / kind / "a.jpg").read_bytes()
            argv = [f"images={folder / kind}", f"out={folder}"]
            outcome = run(["attention", "checkpoint=random:vit_tiny_patch16_224", *argv])
            kept = (folder / kind / "a.jpg").read_bytes() == before
            yield row("output", f"images={kind}", outcome, outcome.text.strip()[-160:], good=kept and outcome.code == 2)


def refused(kind: str, name: str, folder: Path, argv: list[str]) -> Row:
    """The row of a command that ought to end with 2."""
    outcome = run([word.format(folder) for word in argv])
    if (folder / "ran").exists():
        shutil.rmtree(folder / "ran")
        return Row(kind, name, outcome.code, "ITS CODE RAN", True)
    lines = [line for line in outcome.text.replace(str(folder), "").splitlines() if line.strip()]
    return row(kind, name, outcome, " ".join(lines[:3]), good=outcome.code == 2)


def row(kind: str, name: str, outcome: Outcome, what: str, *, good: bool) -> Row:
    """A row; of a command that did not do as it should, the end of what it said."""
    good = good and "Traceback" not in outcome.text
    return Row(kind, name, outcome.code, what if good else outcome.text.strip()[-300:], not good)


def main() -> int:
    """Print the table; how many rows are bad."""
    torch.set_num_threads(1)
    print("| kind | input | exit code | what happened | traceback or lost run |\n|---|---|---|---|---|")
    bad = 0
    for source in (dataset, files, run_folders, splits, masks, outputs):
        for one in source():
            what = " ".join(one.what.replace("|", "\\|").split())
            name = one.name if len(one.name) < 60 else f"{one.name[:20]}… ({len(one.name)} letters)"
            print(f"| {one.kind} | `{name}` | {one.code} | {what[:200]} | {'YES' if one.bad else 'no'} |", flush=True)
            bad += one.bad
    print(f"\n{bad} bad", file=sys.stderr)
    return bad


if __name__ == "__main__":
    sys.exit(main())
