"""Benchmark the linear probes: agreement with scikit-learn and brute force on real features, and run time.

    PYTHONPATH=. python -m tests.benchmarks.bench_linear_probes agreement CHECKPOINT LABELED
    PYTHONPATH=. python -m tests.benchmarks.bench_linear_probes speed 50000 384

`agreement` uses the features of a trained model for labeled images (a folder with train/ and val/ or test/).
`speed` uses N x D features of ten classes, a mixture of normal distributions. Seconds are CPU time with one
thread, which other processes affect least. Extrapolated times are marked.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import LinearConfig
from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, LinearClassifier, Standardizer
from ssl_vit.evaluation.classification.logistic_regression import FINAL_TOLERANCE, logistic_path, standard_space
from ssl_vit.evaluation.classification.ridge_regression import best_ridge, ridge_path
from ssl_vit.evaluation.classification.sgd_classifiers import Head, Schedule, train_heads
from ssl_vit.evaluation.evaluator import Evaluation
from tests.reference import probes

CLASSES = 10
L2 = [10.0**power for power in range(-8, 3)]
LRS = torch.logspace(-4, 0, 30).tolist()


def agreement(checkpoint: str, labeled: str) -> None:
    """Compare logistic losses, leave-one-out ridge scores and SGD heads on the features of the last block."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"checkpoint={checkpoint}", f"data.root={labeled}", "baselines=false", f"out={folder}/x.json"]
        source = next(
            Evaluation.start("linear", load_config("linear", overrides, LinearConfig)).feature_sources(blocks=1)
        )
    features = FeatureVariant(1, True).of(source.train)
    labels = torch.unique(source.train.labels, return_inverse=True)[1]
    print(f"{len(features):,} x {features.shape[1]} features of {checkpoint}, {int(labels.max()) + 1} classes")
    some = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    logistic_agreement(features[some[:10_000]], labels[some[:10_000]])
    ridge_agreement(features[some[:400]], labels[some[:400]])
    sgd_agreement(features[some[:2000]], labels[some[:2000]])


def logistic_agreement(x: Tensor, labels: Tensor) -> None:
    """Print the difference of the loss to that of scikit-learn along a path of penalties."""
    classes = int(labels.max()) + 1
    space, z = standard_space(x), Standardizer.of(x).apply(x.double())
    penalties = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    print(f"logistic regression on {len(x):,} images: loss of scikit-learn, our difference along the path, and alone")
    for l2, probe in logistic_path(space, labels, classes=classes, l2=penalties):
        ((_, alone),) = logistic_path(space, labels, classes=classes, l2=[l2], tolerance=FINAL_TOLERANCE)
        model = LogisticRegression(C=1 / (len(z) * l2), tol=1e-7, max_iter=10_000).fit(z.numpy(), labels.numpy())
        theirs = loss_of(z, labels, l2, torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_))
        ours = [loss_of(z, labels, l2, found.weight.double(), found.bias.double()) for found in (probe, alone)]
        print(f"  l2 {l2:.0e}  {theirs:.6f}  {ours[0] - theirs:+.1e}  {ours[1] - theirs:+.1e}")


def ridge_agreement(x: Tensor, labels: Tensor) -> None:
    """Print the difference of leave-one-out scores to those of refits."""
    z, targets = Standardizer.of(x).apply(x.double()), 2.0 * F.one_hot(labels).double() - 1
    for fit in ridge_path(x, labels, classes=targets.shape[1], l2=[1e-6, 1e-3, 1.0]):
        refitted = probes.ridge_leave_one_out(z, targets, len(z) * fit.l2)
        gap = float((fit.loo_scores - refitted).abs().max() / refitted.abs().max())
        print(f"ridge, l2 {fit.l2:.0e}: leave-one-out scores of {len(x)} images differ by {gap:.0e} of the largest")


def sgd_agreement(x: Tensor, labels: Tensor) -> None:
    """Print the difference of weights trained together to those of `torch.optim.SGD`."""
    schedule, classes = Schedule(epochs=2, batch_size=256, seed=0), int(labels.max()) + 1
    heads = [Head(slice(0, width), lr, decay) for width in (64, 128) for lr in (1e-3, 0.1) for decay in (0.0, 1e-3)]
    exact = x.double()
    found = train_heads(exact, labels, classes=classes, heads=heads, schedule=schedule)
    z, batches = Standardizer.of(x).apply(exact), orders(len(x), schedule)
    gap = 0.0
    for head, probe in zip(heads, found, strict=True):
        alone = probes.sgd_head(
            z[:, head.columns], labels, classes, lr=head.lr, weight_decay=head.weight_decay, batches=batches
        )
        gap = max(gap, float((probe.weight - alone.weight.T).abs().max() / alone.weight.abs().max()))
    print(f"SGD, {len(heads)} heads: weights differ by {gap:.0e} of the largest")


def speed(count: int, dim: int) -> None:
    """Time the three solvers and their slow forms."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centers = torch.randn(CLASSES, dim, generator=generator)
    # As in models, few directions carry most of the variance.
    mixing = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -2, dim)[:, None]
    x = (centers[labels] + 4 * torch.randn(count, dim, generator=generator)) @ mixing
    print(f"{count:,} x {dim}, {CLASSES} classes")
    ridge_speed(x, labels)
    logistic_speed(x, labels)
    sgd_speed(x, labels)


def ridge_speed(x: Tensor, labels: Tensor) -> None:
    """Time one eigendecomposition against one solution per penalty, and leave-one-out against refits."""
    fast = seconds(lambda: best_ridge(ridge_path(x, labels, classes=CLASSES, l2=L2), labels))
    print(f"ridge, {len(L2)} penalties with leave-one-out: {fast:.1f} s")
    targets = 2.0 * F.one_hot(labels).double() - 1

    def solve(z: Tensor, y: Tensor, l2: float) -> Tensor:
        with_bias = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
        regularizer = l2 * len(x) * torch.eye(z.shape[1] + 1, dtype=z.dtype)
        regularizer[-1, -1] = 0
        return torch.linalg.solve(with_bias.T @ with_bias + regularizer, with_bias.T @ y)

    def one() -> Tensor:
        return solve(Standardizer.of(x).apply(x.double()), targets, 1e-3)

    once = seconds(one)
    print(f"  one solution per penalty, without leave-one-out: {once * len(L2):.1f} s (one measured, times {len(L2)})")
    hours = once * len(L2) * len(x) / 3600
    print(f"  leave-one-out by refits: {hours:,.0f} h (extrapolated: as many such solutions as images and penalties)")


def logistic_speed(x: Tensor, labels: Tensor) -> None:
    """Time the path of penalties against each from zero, and against scikit-learn."""
    penalties = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    space = seconds(lambda: standard_space(x))
    prepared = standard_space(x)

    def path(l2: list[float]) -> list[tuple[float, LinearClassifier]]:
        return list(logistic_path(prepared, labels, classes=CLASSES, l2=l2))

    print(f"logistic, {len(penalties)} penalties: {space + seconds(lambda: path(penalties)):.1f} s")
    cold = sum(seconds(lambda l2=l2: path([l2])) for l2 in penalties)
    print(f"  each from zero: {space + cold:.1f} s")
    z = Standardizer.of(x).apply(x.double())
    model = LogisticRegression(C=1 / (len(z) * 1e-4), tol=1e-6, max_iter=10_000)
    theirs = seconds(lambda: model.fit(z.numpy(), labels.numpy()))
    ((_, probe),) = path([1e-4])
    gap = loss_of(z, labels, 1e-4, torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_))
    gap -= loss_of(z, labels, 1e-4, probe.weight.double(), probe.bias.double())
    print(f"  scikit-learn, one penalty of them (1e-04): {theirs:.1f} s, its loss minus ours {gap:+.0e}")


def sgd_speed(x: Tensor, labels: Tensor) -> None:
    """Time all heads at once against one after the other by `torch.optim.SGD`."""
    schedule = Schedule(epochs=10, batch_size=256, seed=0)
    heads = [Head(slice(0, x.shape[1]), lr, 0.0) for lr in LRS]
    fast = seconds(lambda: train_heads(x, labels, classes=CLASSES, heads=heads, schedule=schedule))
    print(f"SGD, {len(heads)} heads at once, {schedule.epochs} epochs: {fast:.1f} s")
    z, batches = Standardizer.of(x).apply(x.double()).float(), orders(len(x), schedule)
    alone = seconds(lambda: probes.sgd_head(z, labels, CLASSES, lr=LRS[0], weight_decay=0.0, batches=batches))
    print(f"  one by one: {alone * len(heads):.1f} s (one measured, times {len(heads)})")


def orders(count: int, schedule: Schedule) -> list[Tensor]:
    """Return the batches of `train_heads`."""
    generator = torch.Generator().manual_seed(schedule.seed)
    batches = -(-count // schedule.batch_size)
    return [
        part
        for _ in range(schedule.epochs)
        for part in torch.randperm(count, generator=generator).tensor_split(batches)
    ]


def loss_of(z: Tensor, labels: Tensor, l2: float, weight: Tensor, bias: Tensor) -> float:
    """Compute mean cross-entropy and penalty of weights (D, C) on standardized features."""
    return float(F.cross_entropy(z @ weight + bias, labels) + l2 / 2 * weight.square().sum())


def seconds(work: Callable[[], object]) -> float:
    """Measure CPU time."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    if sys.argv[1] == "agreement":
        agreement(*sys.argv[2:4])
    else:
        speed(*map(int, sys.argv[2:4]))
