"""Measure exact kNN against DINO's way to it (100 chunks of queries, one search per k, dense one-hot votes).

    PYTHONPATH=tests python tools/bench_knn.py 10000 50000 384

QUERIES, BANK, DIM of the features: an isotropic mixture of ten classes, x = center + 4 noise with centers and noise
from the standard normal distribution, scaled to length 1. All answer for k = 10, 20, 100, 200 (what fits the bank) at
temperature 0.07, in turn, in one process per number of threads. A row holds the median of the seconds and their range,
how many times faster than DINO's way that is, and whether all predictions are the same. With one thread the seconds
are those of the processor, which other work on the machine disturbs less; with two they are those of the clock.
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


def main(queries: int, bank: int, dim: int) -> None:
    """One process per number of threads."""
    print(f"{queries:,} queries, {bank:,} x {dim}")
    print(f"{'threads':>7}  {'way':<8}{'seconds':>9}{'range':>16}{'faster':>8}  same predictions")
    for threads in range(1, min(2, os.cpu_count() or 1) + 1):
        environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        command = [sys.executable, __file__, *map(str, (queries, bank, dim)), "measure"]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        for row in json.loads(done.stdout):
            seconds, slow = median(row["seconds"]), median(row["reference"])
            spread = f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}"
            same = "yes" if row["differ"] == 0 else f"{row['differ']} of {row['answers']} differ"
            print(f"{threads:>7}  {row['way']:<8}{seconds:>9.2f}{spread:>16}{slow / seconds:>8.1f}  {same}")


def measure(queries: int, bank: int, dim: int) -> None:
    """All ways in this process, as JSON."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, dim, generator=generator)
    known, asked = (mixture(count, centers, generator) for count in (bank, queries))
    ks = [k for k in (10, 20, 100, 200) if k <= bank]
    chosen = choose_engine("auto", torch.device("cpu"))
    slow = partial(chunked_knn, known.features, known.labels, asked.features, CLASSES)
    fast = partial(knn, known, asked)
    ways = {
        "DINO's": lambda: slow(ks=ks, temperature=TEMPERATURE, chunks=min(100, queries)),
        "torch": lambda: fast(ks=ks, temperature=TEMPERATURE, engine="torch").ranks,
        "faiss": lambda: fast(ks=ks, temperature=TEMPERATURE, engine="faiss").ranks,
        f"auto: {chosen}": lambda: fast(ks=ks, temperature=TEMPERATURE).ranks,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found = {}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(ROUNDS):
        for way, answer in ways.items():
            start = clock()
            found[way] = answer()
            seconds[way].append(clock() - start)
    classes = found.pop("DINO's")
    right = {k: answers == asked.labels for k, answers in classes.items()}
    rows = []
    for way, values in seconds.items():
        ranks = found.get(way)
        differ = sum(int(((ranks[k] == 0) != right[k]).sum()) for k in ks) if ranks else 0
        rows.append({
            "way": way, "seconds": values, "reference": seconds["DINO's"], "differ": differ,
            "answers": queries * len(ks),
        })  # fmt: skip
    print(json.dumps(rows))


def mixture(count: int, centers: torch.Tensor, generator: torch.Generator) -> LabeledFeatures:
    """Features around the center of a class chosen for each, and the class."""
    labels = torch.randint(len(centers), (count,), generator=generator)
    noise = torch.randn(count, centers.shape[1], generator=generator)
    return LabeledFeatures(F.normalize(centers[labels] + NOISE * noise, dim=1), labels)


if __name__ == "__main__":
    sizes = [int(word) for word in sys.argv[1:4]]
    measure(*sizes) if sys.argv[4:] else main(*sizes)
