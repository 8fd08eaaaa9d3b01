"""Where the time of a step goes: the parts add up to the wall clock, and waiting for data is what it is."""

import time

import lightning as L
import pytest
import torch

import ssl_vit.commands.pretrain as command
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.runtime.device import autocast_dtype, matmul_peak, peak_memory, reset_peak_memory
from ssl_vit.runtime.step_timer import PHASES, StepTimer
from ssl_vit.training import loop
from tests.helpers.cli import rows

CPU = torch.device("cpu")


def test_step_timer_gives_each_part_its_time():
    laps = StepTimer()
    time.sleep(0.01)  # before the start: not counted
    laps.start(CPU)
    began = time.perf_counter()
    for part, seconds in (("data", 0.03), ("loss", 0.01), ("data", 0.02)):
        time.sleep(seconds)
        laps.mark(part)
    wall = time.perf_counter() - began
    totals = laps.totals()
    assert totals.keys() == {"data", "loss"}
    assert totals["data"] >= 0.05
    assert 0.01 <= totals["loss"] < 0.03
    assert sum(totals.values()) == pytest.approx(wall, abs=1e-3)
    assert laps.totals() == {}
    time.sleep(0.01)
    laps.mark("other")
    assert laps.totals()["other"] >= 0.01  # nothing between two totals is lost


def test_step_timer_costs_next_to_nothing():
    laps = StepTimer()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(1000):
            laps.mark("loss")
        best = min(best, (time.perf_counter() - began) / 1000)
    assert best < 2e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_timer_on_a_gpu_takes_the_time_of_the_device():
    a, laps = torch.rand(8192, 8192, device="cuda"), StepTimer()
    torch.mm(a, a)
    torch.cuda.synchronize()
    laps.start(a.device)
    began = time.perf_counter()
    for _ in range(10):
        torch.mm(a, a)
    laps.mark("student")
    issued = time.perf_counter() - began
    totals = laps.totals()
    wall = time.perf_counter() - began
    assert issued < wall / 2
    assert totals["student"] == pytest.approx(wall, rel=0.2)


class WallClock(L.Callback):
    """Notes the wall clock when training starts and when a batch has been learned from."""

    def __init__(self):
        self.ends = []

    def on_train_epoch_start(self, trainer, module):
        self.ends = self.ends or [time.perf_counter()]

    def on_train_batch_end(self, trainer, module, *_):
        self.ends.append(time.perf_counter())


@pytest.fixture
def clocked(monkeypatch):
    """A wall clock that is the first of the callbacks."""
    clock, original = WallClock(), loop.build_trainer

    def with_clock(config, plan, loggers, callbacks, *rest):
        return original(config, plan, loggers, [clock, *callbacks], *rest)

    monkeypatch.setattr(loop, "build_trainer", with_clock)
    return clock


@pytest.mark.parametrize(
    ("method", "accumulate", "missing"),
    [("dino", 1, {"corruption"}), ("dino", 2, {"corruption"}), ("sit", 1, {"teacher"})],
)
def test_step_timer_parts_add_up_to_the_wall_time(pretrain_config, clocked, method, accumulate, missing):
    run = pretrain(
        pretrain_config(
            f"method={method}",
            f"trainer.accumulate_grad_batches={accumulate}",
            "trainer.log_every_n_steps=2",
            "data.num_workers=0",
        )
    )
    for number, row in enumerate(rows(run)):
        parts = {part: float(row[f"speed/{part}_ms"]) for part in PHASES if part not in missing}
        assert not {name for name in row if name.endswith("_ms")} - {f"speed/{part}_ms" for part in parts}
        assert all(milliseconds > 0 for milliseconds in parts.values())
        step = sum(parts.values())
        ends = clocked.ends[:: 2 * accumulate]
        wall = 1000 * (ends[number + 1] - ends[number]) / 2
        assert step == pytest.approx(wall, rel=0.1, abs=5)
        assert float(row["speed/images_per_s"]) == pytest.approx(1000 * 16 / step, rel=1e-6)
        assert float(row["speed/data_wait"]) == pytest.approx(parts["data"] / step, rel=1e-6)


def test_flops_and_memory_are_in_every_row(pretrain_config):
    run = pretrain(pretrain_config("trainer.max_steps=2"))
    peak = matmul_peak("cpu", "bf16-mixed" if autocast_dtype(CPU) else "32-true")
    for row in rows(run):
        speeds = {name.removeprefix("speed/"): float(value) for name, value in row.items() if "speed/" in name}
        assert speeds["tflops"] > 0
        assert speeds["peak_share"] == pytest.approx(speeds["tflops"] * 1e12 / peak)
        assert 0 < speeds["peak_share"] < 1
        assert 0.1 < speeds["host_gb"] < 100
        assert "device_gb" not in speeds


class Slow:
    """A loader that takes its time for each batch, and notes how long it took."""

    def __init__(self, loader):
        self.loader = loader
        self.seconds = []

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        began = time.perf_counter()
        for batch in self.loader:
            time.sleep(0.1)
            self.seconds.append(time.perf_counter() - began)
            yield batch
            began = time.perf_counter()


def test_step_timer_counts_waiting_for_a_slow_loader_but_not_evaluation(pretrain_config, monkeypatch):
    loaders, loader_of, measure = [], command.build_train_loader, command.OnlineEval._evaluate

    def slow(*args, **kwargs):
        loaders.append(Slow(loader_of(*args, **kwargs)))
        return loaders[-1]

    def long_measure(self, *args, **kwargs):
        measure(self, *args, **kwargs)
        time.sleep(0.5)

    monkeypatch.setattr(command, "build_train_loader", slow)
    monkeypatch.setattr(command.OnlineEval, "_evaluate", long_measure)
    words = ("data.batch_size=64", "trainer.max_steps=6", "trainer.log_every_n_steps=3", "online.every_epochs=1")
    metrics = rows(pretrain(pretrain_config(*words)))
    first, second = (row for row in metrics if row["train/loss"])  # an epoch each
    taken = loaders[0].seconds
    for row, waited in ((first, sum(taken[:3]) / 3), (second, sum(taken[3:]) / 3)):
        assert float(row["speed/data_ms"]) == pytest.approx(1000 * waited, rel=0.1, abs=5)
        step = sum(float(row[f"speed/{part}_ms"]) for part in PHASES if part != "corruption")
        assert float(row["speed/data_wait"]) == pytest.approx(1000 * waited / step, abs=0.03)
    assert float(second["speed/other_ms"]) > 500 / 3  # kNN after the first epoch, and the checkpoint


def test_progress_bar_shows_loss_speed_and_waiting(pretrain_config, capsys):
    pretrain(pretrain_config("trainer.max_steps=2"))
    bar = capsys.readouterr().err
    for part in ("loss", "img/s", "of peak", "data wait"):
        assert part in bar


def test_peak_memory_restarts_where_the_system_can():
    reset_peak_memory(CPU)
    before = peak_memory(CPU)["host_gb"]
    big = torch.ones(100_000_000 // 4)
    held = peak_memory(CPU)["host_gb"]
    assert held - before == pytest.approx(0.1, abs=0.03)
    del big
    assert peak_memory(CPU)["host_gb"] == pytest.approx(held, abs=0.01)
