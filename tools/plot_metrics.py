"""Plot metrics.csv of one or several runs: a chart per metric, a line per run.

python tools/plot_metrics.py metrics.png runs/photos runs/photos-resumed
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

METRICS = [
    "train/loss",
    "online/knn@20",
    "online/linear",
    "train/effective_rank",
    "train/feature_std",
    "train/alignment",
    "train/uniformity",
    "schedule/lr",
    "speed/images_per_s",
]


def main(out: Path, runs: list[Path]) -> None:
    """Write the figure."""
    figure, grid = plt.subplots(3, 3, figsize=(15, 10), layout="constrained")
    for run in runs:
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for name, axes in zip(METRICS, grid.flat, strict=True):
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=run.name)
    for name, axes in zip(METRICS, grid.flat, strict=True):
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    grid.flat[0].legend()
    figure.savefig(out, dpi=100)
    print(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
