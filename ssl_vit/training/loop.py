"""The training loop of every run: pretraining, fine-tuning, and the published linear protocols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import lightning as L
from lightning.pytorch.loggers import Logger

from ssl_vit.config.pretrain import TrainerConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.loading.loader import TrainingLoader
from ssl_vit.data.loading.ram_cache import InMemoryLoader
from ssl_vit.methods.base import SSLMethod
from ssl_vit.runtime.atomic_io import JSONLWriter
from ssl_vit.runtime.distributed import shutdown_process_group
from ssl_vit.training.callbacks.consistency_check import ConsistencyCheck
from ssl_vit.training.callbacks.preemption import PreemptionHandler
from ssl_vit.training.callbacks.progress_bar import TrainingProgressBar
from ssl_vit.training.callbacks.run_checkpoint import RunCheckpoint
from ssl_vit.training.callbacks.skipped_steps import SkippedSteps
from ssl_vit.training.console import skipped_images_summary
from ssl_vit.training.failures import raise_if_diverged, translate_training_errors
from ssl_vit.training.loggers import make_loggers
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
    signals: PreemptionHandler
    notes: list[str] = field(default_factory=list)  # about skipped steps and images

    @property
    def complete(self) -> bool:
        """Whether the run has reached its end."""
        return self.step == self.run.plan.total_steps

    def summary(self, lines: Sequence[str] = ()) -> str:
        """Return where the run stopped, what was skipped, more lines, and where its weights are."""
        total, weights = self.run.plan.total_steps, self.run.path / "backbone.safetensors"
        stopped = f"Stopped and saved after step {self.step:,} of {total:,}. Resume with {self.run.resume_with}."
        backbone = f"Backbone: {weights} ({weights.with_suffix('.json')} shows how to load it)"
        return "\n".join([*([] if self.complete else [stopped]), *self.notes, *lines, backbone])

    def requeue_job(self) -> None:
        """Requeue the job if its scheduler asked the run to stop."""
        if outcome := self.signals.requeue_job():
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

    Args:
        module: The Lightning module.
        run: State of the run: it is resumed where there is a checkpoint.
        loader: Makes the batches.
        config: The section `trainer`.
        callbacks: They see the end of a step before its checkpoint is written.
        skipped: Log of the images that cannot be read.
        loggers: Of metrics.
        steps: Count of the skipped steps, one of the callbacks; None: a protocol that skips none.
        is_best: Whether this step's checkpoint is the best so far.
        on_start: Called in the first process when all is ready, just before the first step.

    Raises:
        UserError: No image can be read, training failed, or diverged.
    """
    signals = PreemptionHandler()
    checkpoints = RunCheckpoint(
        run.path / "checkpoints",
        config,
        signals=signals,
        is_best=is_best,
        resume_with=run.resume_with,
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
    return FitResult(run, trainer.global_step, trainer.is_global_zero, signals)


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

    Args:
        config: Of the run.
        run: State of the run.
        method: To train.
        loader: Makes the batches.
        callbacks: Of this command.
        skipped: Log of the images that cannot be read.
        summary: Printed before the first step.
        is_best: Whether this step's checkpoint is the best so far.

    Raises:
        UserError: No image can be read, training failed, or diverged.
    """
    journal = JSONLWriter(run.path / "skipped_steps.jsonl", run.done)
    steps = SkippedSteps(journal, run.train, max_in_a_row=config.trainer.max_skipped_steps)
    consistency = ConsistencyCheck(
        {
            "images (data.root must be the same folder on every machine)": run.dataset.fingerprint(sizes=False),
            "checkpoints (run.folder must be the same folder on every machine)": f"{run.checkpoint} {run.done}",
            "configurations": repr(config),
        }
    )

    def on_start() -> None:
        write_run_metadata(config, run.dataset)
        print(summary, flush=True)

    result = fit(
        method,
        run,
        loader,
        config.trainer,
        [consistency, steps, TrainingProgressBar(run.plan), *callbacks],
        skipped=skipped,
        loggers=make_loggers(config.logger, run, hyperparameters=config.model_dump(mode="json")),
        steps=steps,
        is_best=is_best,
        on_start=on_start,
    )
    return replace(result, notes=[*steps.summary(), *skipped_images_summary(skipped)])
