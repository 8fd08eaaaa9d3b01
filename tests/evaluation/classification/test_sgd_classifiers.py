"""Heads that are trained simultaneously equal those of torch.optim.SGD one by one."""

import pytest
import torch
import torch.nn.functional as F

from ssl_vit.evaluation.classification.sgd_classifiers import Head, Schedule, train_heads
from tests.reference import probes

SCHEDULE = Schedule(epochs=4, batch_size=16, seed=3)
COLUMNS = [slice(0, 8), slice(4, 8), slice(4, 11)]
GRID = [Head(columns, lr, decay) for columns in COLUMNS for lr in (1e-3, 0.1) for decay in (0.0, 0.05)]


def make_data(count=70, dim=11, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=g)
    x = torch.randn(count, dim, generator=g, dtype=torch.float64)
    x[:, :classes] += 2 * F.one_hot(labels, classes)
    return x * torch.logspace(2, -2, dim) + 5, labels


def batches_of(train, schedule):
    """Return the batches: per epoch a new order, divided into batches of nearly equal size."""
    g = torch.Generator().manual_seed(schedule.seed)
    orders = [train[torch.randperm(len(train), generator=g)] for _ in range(schedule.epochs)]
    pieces = -(-len(train) // schedule.batch_size)
    return [batch for order in orders for batch in order.tensor_split(pieces)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("subset", ["all", "some"])
def test_train_heads_equals_torch_sgd(dtype, subset):
    x, labels = make_data()
    x = x.to(dtype)
    mask = torch.arange(70) % 5 > 0 if subset == "some" else None
    train = torch.arange(70) if mask is None else mask.nonzero().squeeze(1)
    found = train_heads(x, labels, classes=3, heads=GRID, schedule=SCHEDULE, mask=mask)
    exact = x.double()
    z = ((exact - exact.mean(0)) / exact.std(0, correction=0)).to(dtype)
    batches = batches_of(train, SCHEDULE)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for head, probe in zip(GRID, found, strict=True):
        columns = z[:, head.columns]
        alone = probes.sgd_head(columns, labels, 3, lr=head.lr, weight_decay=head.weight_decay, batches=batches)
        torch.testing.assert_close(probe.weight, alone.weight.T, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(probe.bias, alone.bias, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(probe.logits(x[:, head.columns]), alone(columns), rtol=1e-4, atol=1e-4)


def test_train_heads_isolates_a_diverging_head():
    x, labels = make_data()
    wild = [Head(columns, 1e200, 1.0) for columns in COLUMNS]
    mixed = [head for columns in COLUMNS for head in (*GRID, *wild) if head.columns == columns]
    found = train_heads(x, labels, classes=3, heads=mixed, schedule=SCHEDULE)
    finite = [probe for head, probe in zip(mixed, found, strict=True) if head.lr < 1e200]
    assert sum(not probe.weight.isfinite().all() for probe in found) == len(wild)
    for probe, plain in zip(finite, train_heads(x, labels, classes=3, heads=GRID, schedule=SCHEDULE), strict=True):
        torch.testing.assert_close(probe.weight, plain.weight, rtol=1e-10, atol=1e-10)


def test_train_heads_depends_on_the_seed():
    x, labels = make_data()
    weights = [
        train_heads(x, labels, classes=3, heads=GRID[1:2], schedule=SCHEDULE._replace(seed=seed))[0].weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_train_heads_converges_to_the_minimum():
    x, labels = make_data(30, 3)
    schedule = Schedule(epochs=400, batch_size=30, seed=0)
    (probe,) = train_heads(x, labels, classes=3, heads=[Head(slice(0, 3), 0.3, 0.05)], schedule=schedule)
    loss = F.cross_entropy(probe.logits(x), labels) + 0.05 / 2 * probe.weight.square().sum()
    assert float(loss) == pytest.approx(probes.logistic_loss(x, labels, 3, 0.05), abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 17])
def test_train_heads_accepts_few_images_and_constant_features(count):
    """One image, batches of different sizes, float16 features."""
    x, labels = make_data(count)
    x = torch.cat([x, torch.full((count, 2), 7.0)], dim=1).half()
    (probe,) = train_heads(x, labels, classes=3, heads=[Head(slice(0, 13), 0.1, 0.0)], schedule=SCHEDULE)
    assert probe.logits(x.float()).isfinite().all()
    assert probe.weight.dtype == torch.float32
    elsewhere = x.float() + torch.tensor([0.0] * 11 + [100.0, -100.0])
    torch.testing.assert_close(probe.logits(elsewhere), probe.logits(x.float()))
