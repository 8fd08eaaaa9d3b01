"""Measure the startup time of the command line, and the time to the first step of a small run.

    python tools/bench_startup.py FOLDER

FOLDER contains images to train on; the run is written to a temporary folder. Each row is the median of five processes
(three for the run), in seconds of wall time from the start of the process, with the range. The first step ends when its
row is in metrics.csv, which is written in the next step.
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


def main(folder: Path) -> None:
    """Print one row per command."""
    for name, argv in {
        "overview": [],
        "pretrain --help": ["pretrain", "--help"],
        "pretrain --cfg": ["pretrain", "--cfg"],
        "an unknown key": ["pretrain", f"data.root={folder}", "sede=1"],
        "import of torch only": None,
    }.items():
        command = [sys.executable, "-c", "import torch"] if argv is None else [*COMMAND, *argv]
        print_row(name, [time_process(command) for _ in range(5)])
    print_row("first step of a small run", [time_to_first_step(folder) for _ in range(3)])


def print_row(name: str, seconds: list[float]) -> None:
    """Print the median and the range."""
    print(f"{name:<28}{median(seconds):>7.2f}  ({min(seconds):.2f} to {max(seconds):.2f})", flush=True)


def time_process(command: list[str]) -> float:
    """Return the seconds until a process ends."""
    start = time.perf_counter()
    subprocess.run(command, capture_output=True)
    return time.perf_counter() - start


def time_to_first_step(folder: Path) -> float:
    """Return the seconds until metrics.csv contains the row of step 0."""
    with tempfile.TemporaryDirectory() as runs:
        overrides = [f"data.root={folder}", f"run.folder={runs}", "run.name=run", "trainer.log_every_n_steps=1", *SMALL]
        start = time.perf_counter()
        run = subprocess.Popen([*COMMAND, "pretrain", *overrides], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = Path(runs) / "run" / "metrics.csv"
        while run.poll() is None and not (rows.is_file() and "\n0," in rows.read_text(encoding="utf-8")):
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if run.wait():
            sys.exit(f"the run failed: {' '.join(overrides)}")
    return seconds


if __name__ == "__main__":
    main(Path(sys.argv[1]))
