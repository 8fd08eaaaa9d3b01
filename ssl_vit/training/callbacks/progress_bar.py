"""Write the rows of metrics with the training speed, and show one progress bar for the whole run."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.runtime.device import matmul_peak, peak_memory
from ssl_vit.runtime.progress import progress_bar

_STEP_METRICS = ("train/", "schedule/")


class TrainingProgressBar(ProgressBar):
    """Progress bar that also logs the speed of the run with the step's other metrics.

    Lightning logs a step only after the callbacks have seen its end; here its row is written before they save a
    checkpoint of it. The times are those of the method's step timer, which add up to the wall time.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__()
        self.plan = plan
        self.bar: tqdm[None] | None = None

    def disable(self) -> None:
        """Do nothing: Lightning calls this in every process but the first, where there is no bar anyway."""

    def on_train_start(self, trainer: L.Trainer, module: SSLMethod) -> None:  # type: ignore[override]
        self.step = self.window_step = trainer.global_step
        self.flops = module.flops.total * self.plan.batch_size  # per optimizer step
        self.peak = matmul_peak(module.device.type, str(trainer.precision)) * trainer.world_size  # FLOP/s
        if trainer.is_global_zero:
            self.bar = progress_bar(total=self.plan.total_steps, initial=trainer.global_step, unit="step", delay=0)

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.bar:
            self.bar.set_description(f"epoch {trainer.current_epoch + 1}", refresh=False)

    def on_train_batch_end(self, trainer: L.Trainer, module: SSLMethod, *_: object) -> None:  # type: ignore[override]
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            if self.bar:
                self.bar.update(1)
            if self.step % self.plan.log_every == 0:
                self._report(trainer, module)

    def _report(self, trainer: L.Trainer, module: SSLMethod) -> None:
        speed = self._speed(module)
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(_STEP_METRICS)}
        row |= {"epoch": trainer.current_epoch, **{f"speed/{name}": value for name, value in speed.items()}}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=self.step - 1)
        if self.bar:
            self.bar.set_postfix_str(
                f"loss {row['train/loss']:.3f}, {speed['images_per_s']:.0f} img/s, {speed['peak_share']:.0%} of peak, "
                f"data wait {speed['data_wait']:.0%}",
                refresh=False,
            )

    def _speed(self, module: SSLMethod) -> dict[str, float]:
        """Return the speed since the last report; times per optimizer step."""
        steps, self.window_step = self.step - self.window_step, self.step
        seconds = module.timer.totals()
        elapsed = sum(seconds.values())
        flops = self.flops * steps / elapsed  # per second, of all processes
        return {
            "images_per_s": self.plan.batch_size * steps / elapsed,
            "data_wait": seconds["data"] / elapsed,
            **{f"{part}_ms": 1000 * total / steps for part, total in seconds.items()},
            "tflops": flops / 1e12,
            "peak_share": flops / self.peak,
            **peak_memory(module.device),
        }

    def on_train_end(self, *_: object) -> None:
        if self.bar:
            self.bar.close()

    def on_exception(self, *_: object) -> None:
        self.on_train_end()
