"""Benchmark the IVF index of `ssl-vit neighbors` against exact search, one query at a time.

    python tools/bench_ivf_index.py 300000 384

ROWS and DIM of the features: a mixture of 20 classes, x = center + 0.5 A z + 0.1 noise / sqrt(DIM), scaled to length
1; A (DIM, 16) differs per class, its columns as the center of about length 1 and 1/4, z and the noise standard normal.
So a class has 16 directions of its own: isotropic noise has no meaningful neighbors. A row has the target and the
measured recall of the 10 nearest (on other rows than those the number of probes is selected on), the number of lists
searched, the seconds to build, and the median milliseconds per query; the last row is exact search: one product with
all rows and its 10 largest.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch
import torch.nn.functional as F

from ssl_vit.evaluation.classification.ann_index import IVFIndex

CLASSES, DIRECTIONS, K = 20, 16, 10


def main(rows: int, dim: int) -> None:
    """Measure several target recalls."""
    features = mixture(rows, dim)
    print(f"{rows:,} x {dim}, {torch.get_num_threads()} threads")
    print(f"{'target':>7}{'found':>8}{'lists searched':>17}{'build s':>9}{'query ms':>10}")
    for target in (0.9, 0.99):
        quality = IVFIndex.build(features, k=K, recall=target, seed=0).quality
        searched = f"{quality.probes:,} of {quality.lists:,}"
        print(f"{target:>7}{quality.recall:>8.3f}{searched:>17}{quality.build_seconds:>9.1f}{quality.query_ms:>10.2f}")
    times = []
    for query in features[:50]:
        started = time.perf_counter()
        (features @ query).topk(K)
        times.append(1000 * (time.perf_counter() - started))
    print(f"{'exact':>7}{1:>8.3f}{'':>17}{'':>9}{median(times):>10.2f}")


def mixture(rows: int, dim: int) -> torch.Tensor:
    """Return features as in the module docstring, class by class."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.randint(CLASSES, (rows,), generator=generator), minlength=CLASSES)
    parts = []
    for count in counts.tolist():
        center = torch.randn(dim, generator=generator) / dim**0.5
        directions = torch.randn(dim, DIRECTIONS, generator=generator) / (4 * dim**0.5)
        z = torch.randn(count, DIRECTIONS, generator=generator)
        noise = torch.randn(count, dim, generator=generator) / dim**0.5
        parts.append(center + 0.5 * z @ directions.T + 0.1 * noise)
    return F.normalize(torch.cat(parts)[torch.randperm(rows, generator=generator)], dim=1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
