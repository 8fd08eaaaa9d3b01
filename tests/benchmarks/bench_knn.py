"""Benchmark exact kNN against DINO's implementation (100 chunks of queries, one search per k, dense one-hot votes).

    PYTHONPATH=. python -m tests.benchmarks.bench_knn 10000 50000 384

QUERIES, TRAIN, DIM of the features: an isotropic mixture of ten classes, x = center + 4 noise with centers and noise
from the standard normal distribution, scaled to length 1. All implementations run for k = 10, 20, 100, 200 (up to
TRAIN) at temperature 0.07, in turn, in one process per number of threads. A row has the median and range of the
seconds, the speedup over DINO's implementation, and whether all predictions are equal. With one thread the seconds
are CPU time, which other processes affect less; with two they are wall time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from ssl_vit.evaluation.classification.knn import LabeledFeatures, knn
from ssl_vit.evaluation.classification.nearest_neighbors import choose_engine
from tests.reference.probes import chunked_knn

CLASSES, NOISE, TEMPERATURE = 10, 4.0, 0.07
ROUNDS = 3


def main(queries: int, train: int, dim: int) -> None:
    """Run one process per number of threads."""
    print(f"{queries:,} queries, {train:,} x {dim}")
    print(f"{'threads':>7}  {'engine':<8}{'seconds':>9}{'range':>16}{'faster':>8}  same predictions")
    for threads in range(1, min(2, os.cpu_count() or 1) + 1):
        environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        command = [sys.executable, __file__, *map(str, (queries, train, dim)), "measure"]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        for row in json.loads(done.stdout):
            seconds, slow = median(row["seconds"]), median(row["reference"])
            spread = f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}"
            same = "yes" if row["differ"] == 0 else f"{row['differ']} of {row['predictions']} differ"
            print(f"{threads:>7}  {row['engine']:<8}{seconds:>9.2f}{spread:>16}{slow / seconds:>8.1f}  {same}")


def measure(queries: int, train: int, dim: int) -> None:
    """Run all implementations in this process; print JSON."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, dim, generator=generator)
    train_set, query_set = (mixture(count, centers, generator) for count in (train, queries))
    ks = [k for k in (10, 20, 100, 200) if k <= train]
    chosen = choose_engine("auto", torch.device("cpu"))
    slow = partial(chunked_knn, train_set.features, train_set.labels, query_set.features, CLASSES)
    fast = partial(knn, train_set, query_set)
    engines = {
        "DINO's": lambda: slow(ks=ks, temperature=TEMPERATURE, chunks=min(100, queries)),
        "torch": lambda: fast(ks=ks, temperature=TEMPERATURE, engine="torch").ranks,
        "faiss": lambda: fast(ks=ks, temperature=TEMPERATURE, engine="faiss").ranks,
        f"auto: {chosen}": lambda: fast(ks=ks, temperature=TEMPERATURE).ranks,
    }
    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    found = {}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(ROUNDS):
        for engine, run in engines.items():
            start = clock()
            found[engine] = run()
            seconds[engine].append(clock() - start)
    classes = found.pop("DINO's")
    right = {k: predictions == query_set.labels for k, predictions in classes.items()}
    rows = []
    for engine, values in seconds.items():
        ranks = found.get(engine)
        differ = sum(int(((ranks[k] == 0) != right[k]).sum()) for k in ks) if ranks else 0
        rows.append({
            "engine": engine, "seconds": values, "reference": seconds["DINO's"], "differ": differ,
            "predictions": queries * len(ks),
        })  # fmt: skip
    print(json.dumps(rows))


def mixture(count: int, centers: torch.Tensor, generator: torch.Generator) -> LabeledFeatures:
    """Return features around random class centers, with their classes."""
    labels = torch.randint(len(centers), (count,), generator=generator)
    noise = torch.randn(count, centers.shape[1], generator=generator)
    return LabeledFeatures(F.normalize(centers[labels] + NOISE * noise, dim=1), labels)


if __name__ == "__main__":
    sizes = [int(arg) for arg in sys.argv[1:4]]
    measure(*sizes) if sys.argv[4:] else main(*sizes)
