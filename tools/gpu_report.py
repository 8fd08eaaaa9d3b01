"""Measure speed, its breakdown, and correctness on a GPU in at most ten minutes.

    python tools/gpu_report.py OUT.json [--budget SECONDS] [--only NAME ...]

Each measurement is written to OUT.json at once; the same command resumes with those that are missing or failed. On a
CPU all settings are tiny, to test the tool. `gpu_benchmarks.py` measures in its own process, restarted if it dies.
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

# Target images/s on one H200 in bf16.
TARGETS: dict[str, tuple[float, ...]] = {
    "vit_s synthetic": (1200, 1471, 2150),
    "vit_s full": (1200, 1471, 2150),
    "cifar 512": (4200, 10_000),
    "cifar 1024": (4200, 10_000),
    "vit_b": (585, 790),
    "vit_l": (214, 256),
}
# Upper limits of the fraction of a step, for the measurements in LIMITED.
LIMITS = {"data": 0.05, "loss, ema, optimizer, clip": 0.05}
LIMITED = ("vit_s full", "cifar 512", "cifar 1024")


def main(argv: list[str]) -> None:
    """Run the measurements, then print all that are in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--only", nargs="*", default=[], help="measurements whose names begin like this")
    args = parser.parse_args(argv)
    end = time.time() + args.budget
    out: Path = args.out.resolve()
    remove_failures(out)
    with TemporaryDirectory(prefix="gpu-report-") as folder:
        while (left := end - time.time()) > 0:
            before = measurements(out)
            worker = Path(__file__).with_name("gpu_benchmarks.py")
            command = [sys.executable, str(worker), str(out), folder, str(end), *args.only]
            try:
                finished = subprocess.run(command, timeout=left + 5).returncode == 0
            except subprocess.TimeoutExpired:
                break
            if finished or measurements(out) == before:
                break
    print(table(measurements(out)))


def measurements(out: Path) -> dict[str, dict[str, Any]]:
    """Read the measurements by name, in the order in which they were made."""
    return json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}


def remove_failures(out: Path) -> None:
    """Remove failed measurements from the file."""
    if found := measurements(out):
        kept = {name: values for name, values in found.items() if "error" not in values}
        out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return all measurements as text."""
    lines = ["", f"{'measurement':<24}{'images/s':>9}{'batch':>6}{'peak':>6}{'data':>6}{'small':>7}{'GB':>7}  target"]
    for name, values in found.items():
        if "images_per_s" in values:
            lines.append(row(name, values))
    lines.append("small: loss, ema, optimizer and clip; peak: share of the matrix product's speed\n")
    for name, values in found.items():
        if "parts_ms" in values:
            lines.append(f"{name}, ms: " + ", ".join(f"{part} {ms:.2f}" for part, ms in values["parts_ms"].items()))
    for name, values in found.items():
        if "error" in values:
            lines.append(f"{name}: FAILED: {values['error'].strip().splitlines()[-1]}")
        elif "parts_ms" not in values:
            parts = (
                f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in flat(values)
            )
            lines.append(f"{name}: " + ", ".join(parts))
    return "\n".join(lines)


def row(name: str, values: dict[str, Any]) -> str:
    """Return a measurement of speed as one line, with its targets."""
    shares, speed = values["shares"], values["images_per_s"]
    small = sum(shares.get(part, 0) for part in ("loss", "ema", "optimizer", "clip"))
    targets = [f"{target:,} {'reached' if speed >= target else 'not reached'}" for target in TARGETS.get(name, ())]
    if name in LIMITED:
        of_a_step = zip(LIMITS.items(), (shares["data"], small), strict=True)
        targets += [f"{what} below {most:.0%} {'yes' if found < most else 'NO'}" for (what, most), found in of_a_step]
    peak, memory = values["peak_share"], values["memory"]
    return (
        f"{name:<24}{speed:>9,.0f}{values['batch']:>6}{'' if peak is None else f'{peak:.0%}':>6}{shares['data']:>6.1%}"
        f"{small:>7.1%}{memory.get('device_gb', memory.get('host_gb', 0)):>7.1f}  {'; '.join(targets)}"
    )


def flat(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the values that fit into a line."""
    return [(key, value) for key, value in values.items() if not isinstance(value, str) or "\n" not in value]


if __name__ == "__main__":
    main(sys.argv[1:])
