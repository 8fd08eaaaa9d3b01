"""The training loop of every run: pretraining, fine-tuning, and the published linear protocols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import Logger

from ssl_vit.config.pretrain import TrainerConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.loading.loader import TrainingLoader
from ssl_vit.data.loading.ram_cache import InMemoryLoader
from ssl_vit.methods.base import SSLMethod
from ssl_vit.runtime.atomic_io import JSONLWriter
from ssl_vit.runtime.distributed import equal_on_all_ranks, shutdown_process_group
from ssl_vit.runtime.errors import AllRanksError
from ssl_vit.runtime.text import pluralize
from ssl_vit.training.callbacks.preemption import PreemptionHandler
from ssl_vit.training.callbacks.progress_bar import TrainingProgressBar
from ssl_vit.training.callbacks.run_checkpoint import RunCheckpoint
from ssl_vit.training.callbacks.skipped_steps import SkippedSteps
from ssl_vit.training.failures import raise_if_diverged, translate_training_errors
from ssl_vit.training.loggers import make_loggers
from ssl_vit.training.memory_estimate import check_host_memory
from ssl_vit.training.run_dir import AnyRun, RunState, write_run_metadata
from ssl_vit.training.trainer import build_trainer

# `build_train_loader` with its dataset, views and seed; the loop adds what the trainer knows.
LoaderFactory = Callable[..., InMemoryLoader | TrainingLoader]


@dataclass(frozen=True)
class FitResult:
    """The end of a training loop, by completion or by a requested stop."""

    run: RunState
    step: int  # optimizer steps done
    is_global_zero: bool
    checkpoints: RunCheckpoint
    notes: list[str] = field(default_factory=list)  # about skipped steps and images

    @property
    def complete(self) -> bool:
        """Whether the run has reached its end."""
        return self.step == self.run.plan.total_steps

    def stop_message(self) -> str:
        """Return where and why an incomplete run stopped, and how to resume it."""
        reason = ", as trainer.max_time is over" if self.checkpoints.timed_out else ""
        return (
            f"Stopped and saved after step {self.step:,} of {self.run.plan.total_steps:,}{reason}. "
            f"Resume with {self.run.resume_with}."
        )

    def summary(self, lines: Sequence[str] = ()) -> str:
        """Return where the run stopped, what was skipped, more lines, and where its weights are."""
        weights = self.run.path / "backbone.safetensors"
        backbone = f"Backbone: {weights} ({weights.with_suffix('.json')} shows how to load it)"
        return "\n".join([*([] if self.complete else [self.stop_message()]), *self.notes, *lines, backbone])

    def requeue_job(self) -> None:
        """Requeue the job if its scheduler asked the run to stop."""
        if outcome := self.checkpoints.signals.requeue_job():
            print(outcome)


def fit(
    module: L.LightningModule,
    run: RunState,
    loader: LoaderFactory,
    config: TrainerConfig,
    callbacks: Sequence[L.Callback],
    *,
    skipped: SkippedImageLog,
    loggers: Sequence[Logger] = (),
    steps: SkippedSteps | None = None,
    is_best: Callable[[], bool] = lambda: False,
    on_start: Callable[[], None] = lambda: None,
) -> FitResult:
    """Train until the end of the plan or a requested stop, with checkpoints that resume exactly.

    The callbacks see the end of a step before its checkpoint is written; `is_best` answers whether that is the best so
    far. `on_start` is called in the first process when all is ready. A protocol that skips no steps has no `steps`.

    Raises:
        UserError: No image can be read, training failed, or diverged.
    """
    signals = PreemptionHandler()
    checkpoints = RunCheckpoint(
        run.path / "checkpoints", config, signals=signals, is_best=is_best, resume_with=run.resume_with
    )
    everything = [signals, *callbacks, checkpoints]
    trainer = build_trainer(config, run.plan, [*loggers], everything, checkpoints.io, run.path)
    batches = loader(
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=config.accumulate_grad_batches,
        first_step=run.done,
        local_world=config.devices,
        device=trainer.strategy.root_device,
        skipped=skipped,
    )
    if trainer.is_global_zero:
        on_start()
    with translate_training_errors(checkpoints):
        trainer.fit(module, batches, ckpt_path=run.checkpoint, weights_only=True)
    shutdown_process_group()
    raise_if_diverged(checkpoints, steps, trainer.global_step)
    return FitResult(run, trainer.global_step, trainer.is_global_zero, checkpoints)


def fit_run(
    config: AnyRun,
    run: RunState,
    method: SSLMethod,
    loader: LoaderFactory,
    callbacks: Sequence[L.Callback],
    *,
    skipped: SkippedImageLog,
    summary: str,
    is_best: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train a method in its run directory, with the callbacks and loggers of every run.

    The summary is printed before the first step; `is_best` answers whether a step's checkpoint is the best so far.

    Raises:
        UserError: The machine has too little memory, no image can be read, training failed, or diverged.
    """
    summary = "\n".join([summary, *check_host_memory(config, method)])
    journal = JSONLWriter(run.path / "skipped_steps.jsonl", run.done)
    steps = SkippedSteps(journal, run.train, max_in_a_row=config.trainer.max_skipped_steps)
    texts = {
        "images (data.root must be the same folder on every machine)": run.dataset.fingerprint(sizes=False),
        "checkpoints (run.folder must be the same folder on every machine)": f"{run.checkpoint} {run.done}",
        "configurations": repr(config),
    }

    def check_consistency(trainer: L.Trainer, module: L.LightningModule) -> None:
        for name, text in texts.items():
            if trainer.world_size > 1 and not equal_on_all_ranks(text):
                raise AllRanksError(f"the processes see different {name}")

    def on_start() -> None:
        write_run_metadata(config, run.dataset)
        print(summary, flush=True)

    result = fit(
        method,
        run,
        loader,
        config.trainer,
        [LambdaCallback(on_fit_start=check_consistency), steps, TrainingProgressBar(run.plan), *callbacks],
        skipped=skipped,
        loggers=make_loggers(config.logger, run, hyperparameters=config.model_dump(mode="json")),
        steps=steps,
        is_best=is_best,
        on_start=on_start,
    )
    notes = steps.summary()
    if count := skipped.count():
        since = ", at some time since its start" if run.done else ""
        notes.append(f"{pluralize(count, 'image')} could not be read{since}: {skipped.path} lists the skipped images")
    return replace(result, notes=notes)
