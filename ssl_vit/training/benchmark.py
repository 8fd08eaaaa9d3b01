"""Measuring a configuration: its loader alone, its training step alone, and both together, as a real run has them."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import mean, median
from typing import NamedTuple

import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer import Trainer
from torch import Tensor

from ssl_vit.config.methods import CropsConfig
from ssl_vit.config.pretrain import TrainingConfig
from ssl_vit.data.batch import Batch
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.loading.loader import InMemoryLoader, TrainingLoader, build_train_loader
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.flops import Flops
from ssl_vit.methods.schedules import TrainingPlan, make_plan
from ssl_vit.runtime.device import best_device, peak_memory, reset_peak_memory, synchronize
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.runtime.step_timer import PHASES
from ssl_vit.training.checkpointing import AtomicCheckpointIO
from ssl_vit.training.trainer import build_method, build_trainer

WARM_UP = 2  # steps that are left out: allocations, and kernels made at their first use
_GPU_WINDOW = 0.5  # seconds between two times that the CPU waits for the GPU to read its clock
_ENDLESS = 10**9  # steps


class Row(NamedTuple):
    """What was measured of one way to run."""

    images_per_s: float
    steps: int  # measured
    parts: dict[str, float]  # seconds of an optimizer step by part, in their order
    memory: dict[str, float]  # peak, in GB: host_gb, device_gb


class Model(NamedTuple):
    """What the rows are judged by."""

    flops: Flops  # per image
    precision: str  # as Lightning calls it


class StepTimeRecorder(ProgressBar):
    """Reads the laps of a method step by step, and ends its training when `seconds` have been measured.

    The first steps are left out; of steps that take longer than `seconds`, the first. On a GPU some steps are read
    together, so that the CPU stays ahead of it. To Lightning this is a progress bar: it would draw its own otherwise.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.readings: list[dict[str, float]] = []  # seconds of one step by part, the mean of some steps on a GPU
        self.steps: list[int] = []  # that each reading is of

    @property
    def measured(self) -> slice:
        """The readings that count."""
        return slice(min(WARM_UP, len(self.readings) - 1), None)

    def disable(self) -> None:
        """There is nothing to draw."""

    def on_train_start(self, trainer: Trainer, module: SSLMethod) -> None:  # type: ignore[override]
        self.read_step, self.read_at = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: SSLMethod, *_: object) -> None:  # type: ignore[override]
        steps, now = trainer.global_step - self.read_step, time.perf_counter()
        if not steps:  # still accumulating
            return
        warm = len(self.readings) >= WARM_UP
        if module.device.type == "cuda" and warm and now - self.read_at < _GPU_WINDOW:
            return
        self.readings.append({part: seconds / steps for part, seconds in module.timer.totals().items()})
        self.steps.append(steps)
        self.read_step, self.read_at = trainer.global_step, now
        times = [steps * sum(reading.values()) for steps, reading in zip(self.steps, self.readings, strict=True)]
        if len(times) > 1 and max(sum(times[WARM_UP:]), times[-1]) >= self.seconds:
            trainer.should_stop = True


class ConstantLoader:
    """A loader whose batch is there already."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return _ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch


class BenchmarkRun:
    """A configuration under measurement, by the loader, Trainer and method of a real run.

    Args:
        config: As for `pretrain`, of a single process.
        images: To load.
        skipped: Takes those that cannot be read.
        seconds: That a row is measured.
    """

    def __init__(
        self, config: TrainingConfig, dataset: ImageDataset, skipped: SkippedImageLog, *, seconds: float
    ) -> None:
        self.config = config.model_copy(update={"method": config.method.without_first_epochs()})
        self.dataset = dataset
        self.skipped = skipped
        self.seconds = seconds
        self.device = best_device(config.trainer.accelerator)
        self.tried: dict[int, Row] = {}  # the synthetic row of a batch size
        self.resident: InMemoryLoader | None = None  # decoded once for all rows

    def check(self) -> Model:
        """Build the method once, for what it is and for the mistakes that only this finds.

        Raises:
            UserError: Of the configuration.
        """
        method = self._method()
        return Model(method.count_flops(), self._trainer(StepTimeRecorder(1)).precision)

    def shrink(self, most: int) -> None:
        """Have at most so many images in a step, without accumulation if they are fewer than configured."""
        if most >= self.config.data.batch_size:
            return
        batch_size = max(
            self.config.method.batch_multiple,
            most // self.config.method.batch_multiple * self.config.method.batch_multiple,
        )
        self.config = self.config.model_copy(
            update={
                "data": self.config.data.model_copy(update={"batch_size": batch_size}),
                "trainer": self.config.trainer.model_copy(update={"accumulate_grad_batches": 1}),
            }
        )

    def largest_batch(self, step: float) -> int:
        """The most images for which a step takes about `step` seconds or less, from tries with few.

        So many that they are no limit where all of the configuration are possible, and on a GPU.
        """
        tried, possible = 0, self.config.method.batch_multiple
        while possible >= 4 * tried:  # few images at once take longer each
            if self.device.type == "cuda" or possible >= self._micro_batch:
                return _ENDLESS
            tried = possible
            trial = BenchmarkRun(self.config, self.dataset, self.skipped, seconds=min(step, self.seconds) / 2)
            trial.shrink(tried)
            row = trial.row("synthetic")
            self.tried = {tried: row}
            possible = int(step * row.images_per_s)
        return possible

    def row(self, name: str) -> Row:
        """Measure `data`, `synthetic` or `full`."""
        return {"data": self._data, "synthetic": self._synthetic, "full": self._full}[name]()

    def _data(self) -> Row:
        """The loader alone, batch after batch; those that were ready at the start are left out."""
        reset_peak_memory(self.device)
        loader = self._loader()
        ready = loader.num_workers * (loader.prefetch_factor or 0) if isinstance(loader, TrainingLoader) else 0
        first, arrivals = WARM_UP + ready, list[float]()
        for _ in itertools.chain.from_iterable(itertools.repeat(loader)):
            if len(arrivals) == first:
                synchronize(self.device)  # which may be where the images are cropped
            arrivals.append(time.perf_counter())
            if len(arrivals) > first + 1 and arrivals[-1] - arrivals[first] >= self.seconds:
                break
        synchronize(self.device)
        count = len(arrivals) - 1 - first
        seconds = (time.perf_counter() - arrivals[first]) / count
        return Row(self._micro_batch / seconds, count, {"data": seconds}, peak_memory(self.device))

    def _synthetic(self) -> Row:
        """Training on a batch that is there already: medians over the steps."""
        if row := self.tried.pop(self.config.data.batch_size, None):
            return row  # its steps are so long that another try would find no more
        return self._train(ConstantLoader(make_batch(self.config, self._micro_batch, self.device)), median)

    def _full(self) -> Row:
        """Training as it is: means over the steps, because loading processes bring their batches in bursts."""
        return self._train(self._loader(), mean)

    def _train(self, batches: Iterable[Batch], typical: Callable[[list[float]], float]) -> Row:
        readings, count = self._readings(batches)
        gc.collect()  # of the model, or the next row's memory has this one's in it
        step = typical([sum(reading.values()) for reading in readings])
        parts = {part: typical([reading[part] for reading in readings]) for part in PHASES if part in readings[0]}
        return Row(self.config.data.batch_size / step, count, parts, peak_memory(self.device))

    def _readings(self, batches: Iterable[Batch]) -> tuple[list[dict[str, float]], int]:
        """Train; the parts of each step, or of a few at a time, and how many steps they are."""
        watch = StepTimeRecorder(self.seconds)
        reset_peak_memory(self.device)
        try:
            self._trainer(watch).fit(self._method(), batches)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
        return watch.readings[watch.measured], sum(watch.steps[watch.measured])

    @property
    def _micro_batch(self) -> int:
        return self.config.data.batch_size // self.config.trainer.accumulate_grad_batches

    def _plan(self) -> TrainingPlan:
        log_every = (
            self.config.trainer.log_every_n_steps if self._micro_batch > 1 else _ENDLESS
        )  # a single one has no spread
        return make_plan(self.config, len(self.dataset))._replace(total_steps=_ENDLESS, log_every=log_every)

    def _method(self) -> SSLMethod:
        return build_method(self.config, self._plan())

    def _trainer(self, watch: StepTimeRecorder) -> Trainer:
        return build_trainer(self.config, self._plan(), [], [watch], AtomicCheckpointIO(), self.skipped.path.parent)

    def _loader(self) -> InMemoryLoader | TrainingLoader:
        if self.resident:
            return self.resident
        loader = build_train_loader(
            self.dataset,
            MultiCrop(self.config.method.views),
            self.config.data,
            seed=self.config.seed,
            channels=self.config.backbone.in_chans,
            rank=0,
            world=1,
            accumulate=self.config.trainer.accumulate_grad_batches,
            first_step=0,
            skipped=self.skipped,
            device=self.device,
        )
        if isinstance(loader, InMemoryLoader):
            self.resident = loader
        return loader


def make_batch(config: TrainingConfig, dataset: int, device: torch.device) -> Batch:
    """A batch of noise, on the device."""
    views, generator = config.method.views, torch.Generator().manual_seed(config.seed)

    def noise(crops: CropsConfig) -> Tensor:
        shape = (dataset, crops.count, config.backbone.in_chans, crops.size, crops.size)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)

    index = torch.arange(dataset)
    label, key = torch.full((dataset,), -1), sample_keys(config.seed, 0, index)
    return Batch(noise(views.global_crops), noise(views.local_crops), label, index, key)
