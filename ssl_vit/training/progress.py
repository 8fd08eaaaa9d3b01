"""The rows of metrics, and one progress bar for the whole run: loss, images/s, time left, share of waiting for data."""

from __future__ import annotations

import sys
import time

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

_OF_A_STEP = ("train/", "schedule/")


class RunProgress(ProgressBar):
    """Measures the speed of the run, logs it with the step's other metrics, and draws it.

    Lightning logs a step only after the callbacks have seen its end; here its row is written before they save a
    checkpoint of it. Waiting for data is the time between the end of one step and the start of the next.

    Args:
        total_steps: Optimizer steps of the whole run.
        batch_size: Pictures per optimizer step, over all processes.
        every: Optimizer steps between two reports.
    """

    def __init__(self, total_steps: int, batch_size: int, *, every: int) -> None:
        super().__init__()
        self.every = every
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.bar: tqdm[None] | None = None

    def disable(self) -> None:
        """Lightning calls it on every process but the first; there is no bar to take away."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = self.window_step = trainer.global_step
        self.waited = 0.0
        self.window_start = self.last_end = time.perf_counter()
        if trainer.is_global_zero:
            self.bar = tqdm(
                total=self.total_steps,
                initial=trainer.global_step,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 30.0,
            )

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last_end = time.perf_counter()
        if self.step == self.window_step:  # what came before the first step is not part of its time
            self.window_start = self.last_end
        if self.bar:
            self.bar.set_description(f"epoch {trainer.current_epoch + 1}", refresh=False)

    def on_train_batch_start(self, *_: object) -> None:
        self.waited += time.perf_counter() - self.last_end

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        self.last_end = time.perf_counter()
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            if self.bar:
                self.bar.update(1)
            if self.step % self.every == 0:
                self._report(trainer)

    def _report(self, trainer: L.Trainer) -> None:
        elapsed = self.last_end - self.window_start
        speed = (self.step - self.window_step) * self.batch_size / elapsed
        wait = self.waited / elapsed
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(_OF_A_STEP)}
        row |= {"epoch": trainer.current_epoch, "speed/images_per_s": speed, "speed/data_wait": wait}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=self.step - 1)
        if self.bar:
            loss = row["train/loss"]
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} img/s, data wait {wait:.0%}", refresh=False)
        self.window_start, self.window_step, self.waited = self.last_end, self.step, 0.0

    def on_train_end(self, *_: object) -> None:
        if self.bar:
            self.bar.close()

    def on_exception(self, *_: object) -> None:
        self.on_train_end()
