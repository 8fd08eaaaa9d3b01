"""Measure everything that a GPU is for in one run of at most ten minutes: speed, where the time goes, correctness.

    python tools/gpu_report.py OUT.json [--budget SECONDS] [--only NAME ...]

Each figure is written to OUT.json as soon as it is there; a run that is killed leaves those before. The same command
again goes on with what is missing or failed. On a CPU all settings are tiny, to try the tool out. The work is done by
`gpu_benchmarks.py` in a process of its own: should a figure take it down, the next one begins in a new one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

BUDGET = 560.0  # seconds

# Images/s that a figure is to reach, on one H200 in bf16.
TARGETS: dict[str, tuple[float, ...]] = {
    "vit_s synthetic": (1200, 1471, 2150),
    "vit_s full": (1200, 1471, 2150),
    "cifar 512": (4200, 10_000),
    "cifar 1024": (4200, 10_000),
    "vit_b": (585, 790),
    "vit_l": (214, 256),
}
# Shares of a step that these figures are to stay below.
LIMITS = {"data": 0.05, "loss, ema, optimizer, clip": 0.05}
LIMITED = ("vit_s full", "cifar 512", "cifar 1024")


def main(words: list[str]) -> None:
    """Run the measurements, then print all that is in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--only", nargs="*", default=[], help="figures whose names begin so")
    asked = parser.parse_args(words)
    end = time.time() + asked.budget
    out: Path = asked.out.resolve()
    forget_failures(out)
    with TemporaryDirectory(prefix="gpu-figures-") as folder:
        while (left := end - time.time()) > 0:
            before = figures(out)
            worker = Path(__file__).with_name("gpu_benchmarks.py")
            command = [sys.executable, str(worker), str(out), folder, str(end), *asked.only]
            try:
                finished = subprocess.run(command, timeout=left + 5).returncode == 0
            except subprocess.TimeoutExpired:
                break
            if finished or figures(out) == before:
                break
    print(table(figures(out)))


def figures(out: Path) -> dict[str, dict[str, Any]]:
    """What the file holds, by name in the order of measuring."""
    return json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}


def forget_failures(out: Path) -> None:
    """Take the figures that failed out of the file."""
    if found := figures(out):
        kept = {name: figure for name, figure in found.items() if "error" not in figure}
        out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def table(found: dict[str, dict[str, Any]]) -> str:
    """All figures in lines for a terminal."""
    lines = ["", f"{'figure':<24}{'images/s':>9}{'batch':>6}{'peak':>6}{'data':>6}{'small':>7}{'GB':>7}  target"]
    for name, figure in found.items():
        if "images_per_s" in figure:
            lines.append(row(name, figure))
    lines.append("small: loss, ema, optimizer and clip; peak: share of the matrix product's speed\n")
    for name, figure in found.items():
        if "parts_ms" in figure:
            lines.append(f"{name}, ms: " + ", ".join(f"{part} {ms:.2f}" for part, ms in figure["parts_ms"].items()))
    for name, figure in found.items():
        if "error" in figure:
            lines.append(f"{name}: FAILED: {figure['error'].strip().splitlines()[-1]}")
        elif "parts_ms" not in figure:
            said = (
                f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in flat(figure)
            )
            lines.append(f"{name}: " + ", ".join(said))
    return "\n".join(lines)


def row(name: str, figure: dict[str, Any]) -> str:
    """A figure that has images/s, and which of its targets it has reached."""
    shares, speed = figure["shares"], figure["images_per_s"]
    small = sum(shares.get(part, 0) for part in ("loss", "ema", "optimizer", "clip"))
    judged = [f"{target:,} {'reached' if speed >= target else 'not reached'}" for target in TARGETS.get(name, ())]
    if name in LIMITED:
        of_a_step = zip(LIMITS.items(), (shares["data"], small), strict=True)
        judged += [f"{what} below {most:.0%} {'yes' if found < most else 'NO'}" for (what, most), found in of_a_step]
    peak, memory = figure["peak_share"], figure["memory"]
    return (
        f"{name:<24}{speed:>9,.0f}{figure['batch']:>6}{'' if peak is None else f'{peak:.0%}':>6}{shares['data']:>6.1%}"
        f"{small:>7.1%}{memory.get('device_gb', memory.get('host_gb', 0)):>7.1f}  {'; '.join(judged)}"
    )


def flat(figure: dict[str, Any]) -> list[tuple[str, Any]]:
    """What fits into a line."""
    return [(key, value) for key, value in figure.items() if not isinstance(value, str) or "\n" not in value]


if __name__ == "__main__":
    main(sys.argv[1:])
