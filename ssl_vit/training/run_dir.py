"""The run directory: its lock, its metadata, and the state that a new or resumed run begins with."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml
from filelock import FileLock, Timeout

from ssl_vit.config.evaluate import FinetuneConfig
from ssl_vit.config.pretrain import PretrainConfig, RunDirConfig
from ssl_vit.data.dataset import ImageDataset
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.methods.schedules import TrainingPlan, make_plan
from ssl_vit.runtime.atomic_io import atomic_write, replaced_run_path, write_json
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.training.callbacks.preemption import requeued
from ssl_vit.training.checkpointing import resume_point
from ssl_vit.training.resume_checks import (
    CONFIG,
    DATA,
    IMAGES,
    LENGTH,
    check_dataset_unchanged,
    compare_configs,
    hash_sizes,
    read_config,
)
from ssl_vit.training.run_identity import check_deletable, check_startable, mark_as_run

AnyRun = PretrainConfig | FinetuneConfig
RunT = TypeVar("RunT", PretrainConfig, FinetuneConfig)


class RunState(NamedTuple):
    """What a run begins with: its directory, data and plan, and the checkpoint that it resumes from."""

    path: Path
    dataset: ImageDataset  # all images of the run
    train: ImageDataset  # those that it trains on
    plan: TrainingPlan
    checkpoint: Path | None = None  # None: a new run
    done: int = 0  # optimizer steps in the checkpoint
    previous_plan: TrainingPlan | None = None  # before `run.extend_to_epochs` changed the length
    notes: tuple[str, ...] = ()  # messages about the resumed state
    resume_with: str = "run.resume=true"  # for messages


@contextmanager
def lock_run_dir(run: RunDirConfig, *, alternative: str = "another run.name") -> Iterator[None]:
    """Hold the lock of the run directory; it is released when its process ends, however that happens.

    Only the first process of a run takes the lock, beside the real path of the directory: names that link to it share
    it. A command that fails before its run begins leaves no empty
    directories behind, and restores the run that it was about to replace.

    Raises:
        UserError: Another command trains in this directory, or it cannot be created.
    """
    if not is_rank_zero():
        yield
        return
    real = _real_path(run)
    try:
        created = not real.parent.exists()
        if real.is_symlink():  # what is left of a link to itself
            raise OSError(errno.ELOOP, f"{run.name} is a link to itself")
        real.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(real.parent / f".{real.name}.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process is training in {run.path}. Wait for it, stop it, or use {alternative}"
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter from a file system without locks
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"run.folder={run.folder}: {reason}. Choose a writable directory") from None
    with lock:
        restore_or_delete_replaced(run)
        try:
            yield
        finally:
            restore_or_delete_replaced(run)
            with suppress(OSError):  # not empty, or never created
                (real / "checkpoints").rmdir()
                real.rmdir()
            if created and not real.exists():
                Path(lock.lock_file).unlink(missing_ok=True)
                with suppress(OSError):
                    real.parent.rmdir()


def apply_extension(config: RunT) -> RunT:
    """Return the config with the length that `run.extend_to_epochs` asks for."""
    if config.run.extend_to_epochs is None:
        return config
    longer = {"max_epochs": config.run.extend_to_epochs, "max_steps": None}
    return config.model_copy(update={"trainer": config.trainer.model_copy(update=longer)})


def open_run_dir(
    config: AnyRun, dataset: ImageDataset, train_part: Callable[[ImageDataset], ImageDataset] = lambda dataset: dataset
) -> RunState:
    """Prepare the directory for a new run, or find the state that its run resumes from.

    Only the first process changes anything. `run.extend_to_epochs` is already applied to the config, and `train_part`
    selects the images to train on.

    Raises:
        UserError: The directory already contains a run, there is none to resume, the config or the images have
            changed, or all checkpoints are damaged.
    """
    run = config.run
    exists = (run.path / CONFIG).is_file()
    if not exists and any((run.path / "checkpoints").glob("*.ckpt")) and not run.overwrite:
        raise UserError(
            f"{run.path} contains checkpoints but no {CONFIG}. Restore that file to resume, or use run.overwrite=true "
            "to replace the run, or another run.name"
        )
    if not (run.resume is True or (exists and (run.resume == "auto" or requeued()))):
        if is_rank_zero():
            _check_source_is_kept(config)
            prepare_run_dir(run)
            (_real_path(run) / "checkpoints").mkdir(parents=True, exist_ok=True)
        train = train_part(dataset)
        return RunState(run.path, dataset, train, make_plan(config, len(train)))
    if not exists:
        raise UserError(
            f"run.resume=true: {run.path} contains no run. Start one without run.resume, or with run.resume=auto"
        )
    return _resumed(config, dataset, train_part)


def _resumed(config: AnyRun, dataset: ImageDataset, train_part: Callable[[ImageDataset], ImageDataset]) -> RunState:
    run = config.run
    values = read_config(run.path)
    notes = compare_configs(values, config)
    dataset, more = check_dataset_unchanged(run, dataset)
    train = train_part(dataset)
    length = {key: values["trainer"][key] for key in LENGTH}
    previous = config.model_copy(update={"trainer": config.trainer.model_copy(update=length)})
    plan, previous_plan = (make_plan(each, len(train)) for each in (config, previous))
    if plan.total_steps < previous_plan.total_steps:
        raise UserError(
            f"run.extend_to_epochs={run.extend_to_epochs} is {plan.total_steps:,} steps, but the run already has "
            f"{previous_plan.total_steps:,}"
        )
    state = RunState(run.path, dataset, train, plan, previous_plan=previous_plan)
    found, about = resume_point(run.path / "checkpoints")
    if found is None:
        if (run.path / "backbone.safetensors").exists():
            raise UserError(
                f"{run.path}: its checkpoints are missing. Put one back into checkpoints/ to resume, or use "
                "run.overwrite=true to replace the run, or another run.name"
            )
        return state._replace(notes=(*notes, *more, "No checkpoint was written: the run starts from scratch"))
    return state._replace(checkpoint=found.path, done=found.step, notes=(*notes, *about, *more))


def write_run_metadata(config: AnyRun, dataset: ImageDataset) -> None:
    """Write the config and the image list: from here on the directory contains a run, which is never overwritten.

    A run that this one replaces is deleted only now.
    """
    folder = config.run.path
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # also in a resumed run that has saved nothing yet
    if isinstance(dataset, ImageFolder):
        dataset.names.save(folder / IMAGES)
    data = {"count": len(dataset), "fingerprint": dataset.fingerprint(sizes=False), "text": dataset.describe()}
    write_json(folder / DATA, data | {"sizes": hash_sizes(dataset)})
    with atomic_write(folder / CONFIG) as file:
        file.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode())
    mark_as_run(folder)
    restore_or_delete_replaced(config.run)


def _check_source_is_kept(config: AnyRun) -> None:
    """Check that a run does not replace the one that its weights come from.

    Raises:
        UserError: It does.
    """
    source = config.checkpoint
    if config.run.overwrite and source and Path(source).resolve().is_relative_to(_real_path(config.run)):
        raise UserError(
            f"run.overwrite=true would delete {config.run.path}, which checkpoint={source} is in: use another run.name"
        )


def prepare_run_dir(run: RunDirConfig) -> None:
    """Make sure that the directory contains no run; one to be overwritten is moved aside until `write_run_metadata`.

    Raises:
        UserError: It contains a run, and run.overwrite is false; or files that this tool did not write.
    """
    if (run.path / CONFIG).exists() or any((run.path / "checkpoints").glob("*.ckpt")):
        if not run.overwrite:
            raise UserError(
                f"{run.path} already contains a run. Use run.resume=true to continue it, run.overwrite=true to "
                "replace it, or another run.name"
            )
        check_deletable(run.path)
        _real_path(run).rename(_replaced_path(run))
    check_startable(run.path)


def _real_path(run: RunDirConfig) -> Path:
    """Return the run directory behind symbolic links, which stay as they are when a run is replaced."""
    return Path(os.path.realpath(run.path))


def delete_run(run: RunDirConfig) -> None:
    """Delete the run directory, if there is one.

    Raises:
        UserError: This tool did not write it.
    """
    if run.path.exists():
        check_deletable(run.path)
        shutil.rmtree(_real_path(run))


def _replaced_path(run: RunDirConfig) -> Path:
    return replaced_run_path(_real_path(run))


def restore_or_delete_replaced(run: RunDirConfig) -> None:
    """Delete the run that was moved aside if the new one has begun, else move it back.

    Raises:
        UserError: The files of others lie in its place.
    """
    replaced = _replaced_path(run)
    if not replaced.is_dir():
        return
    check_deletable(replaced)
    if (run.path / CONFIG).exists():
        shutil.rmtree(replaced)
    else:
        check_startable(run.path)
        shutil.rmtree(_real_path(run), ignore_errors=True)
        replaced.rename(_real_path(run))
