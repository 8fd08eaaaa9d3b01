"""Benchmark of a configuration: its loader alone, its training step alone, and both together as in a real run."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable
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
from ssl_vit.data.loading.loader import TrainingLoader, build_train_loader
from ssl_vit.data.loading.ram_cache import InMemoryLoader
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.flops import Flops
from ssl_vit.methods.schedules import TrainingPlan, make_plan
from ssl_vit.runtime.device import best_device, peak_memory, reset_peak_memory, synchronize
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.runtime.step_timer import PHASES
from ssl_vit.training.checkpointing import AtomicCheckpointIO
from ssl_vit.training.trainer import build_method, build_trainer

WARM_UP = 2  # steps that are not measured, as they allocate memory and load kernels
_GPU_WINDOW = 0.5  # seconds between two readings of the GPU's time, for which the CPU waits
_ENDLESS = 10**9  # steps


class Row(NamedTuple):
    """Result of one kind of measurement."""

    images_per_s: float
    steps: int  # measured
    phases: dict[str, float]  # seconds of an optimizer step by phase, in order
    memory: dict[str, float]  # peak in GB: host_gb, device_gb


class Model(NamedTuple):
    """Operations and precision of the model."""

    flops: Flops  # per image
    precision: str  # as Lightning calls it


class StepTimeRecorder(ProgressBar):
    """Recorder of the times of each step, which stops the training when `seconds` have been measured.

    The first steps are not measured; of steps that take longer than `seconds`, only the first. On a GPU several steps
    are read together, so that the CPU stays ahead. It is a progress bar so that Lightning does not add its own.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.readings: list[dict[str, float]] = []  # seconds of one step by phase; on a GPU the mean of several steps
        self.steps: list[int] = []  # number of steps of each reading

    @property
    def measured(self) -> slice:
        """Readings after the warm-up."""
        return slice(min(WARM_UP, len(self.readings) - 1), None)

    def disable(self) -> None:
        """Do nothing, as nothing is drawn."""

    def on_train_start(self, trainer: Trainer, module: SSLMethod) -> None:  # type: ignore[override]
        self.read_step, self.read_at = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: SSLMethod, *_: object) -> None:  # type: ignore[override]
        steps, now = trainer.global_step - self.read_step, time.perf_counter()
        if not steps:  # still accumulating
            return
        warm = len(self.readings) >= WARM_UP
        if module.device.type == "cuda" and warm and now - self.read_at < _GPU_WINDOW:
            return
        self.readings.append({phase: seconds / steps for phase, seconds in module.timer.totals().items()})
        self.steps.append(steps)
        self.read_step, self.read_at = trainer.global_step, now
        times = [steps * sum(reading.values()) for steps, reading in zip(self.steps, self.readings, strict=True)]
        if len(times) > 1 and max(sum(times[WARM_UP:]), times[-1]) >= self.seconds:
            trainer.should_stop = True


class BenchmarkRun:
    """Measurements, of so many seconds each, of a configuration with the loader, Trainer and method of a real run."""

    def __init__(
        self, config: TrainingConfig, dataset: ImageDataset, skipped: SkippedImageLog, *, seconds: float
    ) -> None:
        self.config = config.model_copy(update={"method": config.method.without_first_epochs()})
        self.dataset = dataset
        self.skipped = skipped
        self.seconds = seconds
        self.device = best_device(config.trainer.accelerator)
        self.tried: dict[int, Row] = {}  # synthetic row by batch size
        self.resident: InMemoryLoader | None = None  # decoded once for all measurements

    def check(self) -> Model:
        """Build the method and the Trainer once, to check the configuration and to count the operations.

        Raises:
            UserError: The configuration is not valid.
        """
        method = self._method()
        return Model(method.count_flops(), self._trainer(StepTimeRecorder(1)).precision)

    def shrink(self, most: int) -> None:
        """Limit the number of images in a step, without accumulation if the limit is below the batch size."""
        if most >= self.config.data.batch_size:
            return
        multiple = self.config.method.batch_multiple
        batch_size = max(multiple, most // multiple * multiple)
        self.config = self.config.model_copy(
            update={
                "data": self.config.data.model_copy(update={"batch_size": batch_size}),
                "trainer": self.config.trainer.model_copy(update={"accumulate_grad_batches": 1}),
            }
        )

    def largest_batch(self, step: float) -> int:
        """Estimate the most images for which a step takes about `step` seconds, by trying small batches.

        There is no limit on a GPU, or if the batch size of the configuration is small enough.
        """
        tried, possible = 0, self.config.method.batch_multiple
        while possible >= 4 * tried:  # small batches take longer per image
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
        """Run the measurement `data`, `synthetic` or `full`."""
        if name == "data":
            return self._load()
        if name == "full":  # means, because worker processes deliver batches in bursts
            return self._train(self._loader(), mean)
        if row := self.tried.pop(self.config.data.batch_size, None):
            return row  # its steps are too long to repeat them
        return self._train(itertools.repeat(make_batch(self.config, self._micro_batch, self.device)), median)

    def _load(self) -> Row:
        """Measure the loader alone, without the batches that were ready at the start."""
        reset_peak_memory(self.device)
        loader = self._loader()
        ready = loader.num_workers * (loader.prefetch_factor or 0) if isinstance(loader, TrainingLoader) else 0
        first, arrivals = WARM_UP + ready, list[float]()
        for _ in itertools.chain.from_iterable(itertools.repeat(loader)):
            if len(arrivals) == first:
                synchronize(self.device)  # where the images may be cropped
            arrivals.append(time.perf_counter())
            if len(arrivals) > first + 1 and arrivals[-1] - arrivals[first] >= self.seconds:
                break
        synchronize(self.device)
        count = len(arrivals) - 1 - first
        seconds = (time.perf_counter() - arrivals[first]) / count
        return Row(self._micro_batch / seconds, count, {"data": seconds}, peak_memory(self.device))

    def _train(self, batches: Iterable[Batch], typical: Callable[[list[float]], float]) -> Row:
        """Measure training: the typical step and its phases."""
        recorder = StepTimeRecorder(self.seconds)
        reset_peak_memory(self.device)
        try:
            self._trainer(recorder).fit(self._method(), batches)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
        gc.collect()  # frees the model, whose memory would be counted in the next measurement
        readings, steps = recorder.readings[recorder.measured], sum(recorder.steps[recorder.measured])
        seconds = typical([sum(reading.values()) for reading in readings])
        phases = {phase: typical([reading[phase] for reading in readings]) for phase in PHASES if phase in readings[0]}
        return Row(self.config.data.batch_size / seconds, steps, phases, peak_memory(self.device))

    @property
    def _micro_batch(self) -> int:
        return self.config.data.batch_size // self.config.trainer.accumulate_grad_batches

    def _plan(self) -> TrainingPlan:
        # A single image has no statistics.
        log_every = self.config.trainer.log_every_n_steps if self._micro_batch > 1 else _ENDLESS
        return make_plan(self.config, len(self.dataset))._replace(total_steps=_ENDLESS, log_every=log_every)

    def _method(self) -> SSLMethod:
        return build_method(self.config, self._plan())

    def _trainer(self, recorder: StepTimeRecorder) -> Trainer:
        return build_trainer(
            self.config.trainer, self._plan(), [], [recorder], AtomicCheckpointIO(), self.skipped.path.parent
        )

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


def make_batch(config: TrainingConfig, count: int, device: torch.device) -> Batch:
    """Return a batch of `count` images of noise on the device."""
    views, generator = config.method.views, torch.Generator().manual_seed(config.seed)

    def noise(crops: CropsConfig) -> Tensor:
        shape = (count, crops.count, config.backbone.in_chans, crops.size, crops.size)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)

    index = torch.arange(count)
    label, key = torch.full((count,), -1), sample_keys(config.seed, 0, index)
    return Batch(noise(views.global_crops), noise(views.local_crops), label, index, key)
