"""Measure how soon the command line answers, and how soon a small run has made its first step.

    python tools/bench_startup.py FOLDER

FOLDER holds images to train on; the run is written to a temporary folder. Each row is the median of five processes
(of three for the run), in seconds of the clock from the start of the process, and their range. The first step counts as
over when its row stands in metrics.csv: the next step's numbers bring it there, so this is a little late.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

COMMAND = [sys.executable, "-m", "ssl_vit"]
SMALL = ["backbone=vit_cpu", "method.views.local_crops.size=24", "data.batch_size=16", "trainer.max_steps=3"]


def main(dataset: Path) -> None:
    """One row per way of starting."""
    for name, words in {
        "overview": [],
        "pretrain --help": ["pretrain", "--help"],
        "pretrain --cfg": ["pretrain", "--cfg"],
        "a wrong key": ["pretrain", f"data.root={dataset}", "sede=1"],
        "import of torch alone": None,
    }.items():
        command = [sys.executable, "-c", "import torch"] if words is None else [*COMMAND, *words]
        tell(name, [ended(command) for _ in range(5)])
    tell("first step of a small run", [first_step(dataset) for _ in range(3)])


def tell(name: str, seconds: list[float]) -> None:
    """A row."""
    print(f"{name:<28}{median(seconds):>7.2f}  ({min(seconds):.2f} to {max(seconds):.2f})", flush=True)


def ended(command: list[str]) -> float:
    """Seconds to the end of a process."""
    start = time.perf_counter()
    subprocess.run(command, capture_output=True)
    return time.perf_counter() - start


def first_step(dataset: Path) -> float:
    """Seconds to the row of step 0 in metrics.csv."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"data.root={dataset}", f"run.folder={folder}", "run.name=run", "trainer.log_every_n_steps=1", *SMALL]
        start = time.perf_counter()
        run = subprocess.Popen([*COMMAND, "pretrain", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = Path(folder) / "run" / "metrics.csv"
        while run.poll() is None and not (rows.is_file() and "\n0," in rows.read_text(encoding="utf-8")):
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if run.wait():
            sys.exit(f"the run failed: {' '.join(words)}")
    return seconds


if __name__ == "__main__":
    main(Path(sys.argv[1]))
