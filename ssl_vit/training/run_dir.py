"""A run is its folder: who may write to it, how it goes on, and what a changed configuration or folder means for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from filelock import FileLock, Timeout

from ssl_vit.config.evaluate import FinetuneConfig
from ssl_vit.config.pretrain import PretrainConfig, RunConfig, RunDirConfig
from ssl_vit.data.dataset import ImageDataset, escape_path
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.methods.schedules import make_plan
from ssl_vit.models.checkpoint_file import LAST
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.training.callbacks.preemption import requeued
from ssl_vit.training.checkpointing import find_latest_checkpoint

CONFIG = "config.yaml"
DATA = "data.json"  # how many images, and their fingerprint
LENGTH = {"max_epochs", "max_steps"}
IMAGES = "image_list.safetensors"  # their names, where they are files

# Keys that may differ on resume without changing what the run computes. That data.root holds the same images is seen
# from their fingerprint; that a fine-tuning learns from and tests on the same ones, from its origin.
KEYS_ALLOWED_TO_CHANGE = (
    "run.",
    "data.root",
    "data.train",
    "data.test",
    "data.num_workers",
    "trainer.max_time",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.fused_attention",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every",
    "trainer.keep_every_epochs",
    "trainer.max_skipped_steps",
    "logger.",
    "online.",
    "image_logging.",
    "sheet",
)

AnyRun = PretrainConfig | FinetuneConfig
RunT = TypeVar("RunT", PretrainConfig, FinetuneConfig)


class RunState(NamedTuple):
    """Where a run begins or goes on."""

    dataset: ImageDataset
    checkpoint: Path | None
    done: int  # optimizer steps
    before: AnyRun  # with the length that the run has had so far
    notes: list[str]  # what its user should know


@contextmanager
def lock_run_dir(run: RunDirConfig) -> Iterator[None]:
    """Keep every other command out of the run folder; the lock dies with its process, however that ends.

    Processes other than the first one of a run are let in: the first keeps the lock for them.

    Raises:
        UserError: Another command trains there.
    """
    if not is_rank_zero():
        yield
        return
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(run.folder / f".{run.name}.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process is training in {run.path}; wait for it, stop it, or start beside it with run.name=OTHER"
        ) from None
    except OSError as error:
        raise UserError(f"run.folder={run.folder}: {error.strerror}; name a folder that can be written to") from None
    with held:
        restore_or_delete_replaced(run)
        try:
            yield
        finally:
            restore_or_delete_replaced(run)


def apply_extension(config: RunT) -> RunT:
    """The configuration with the length that `run.extend_to_epochs` gives the run."""
    if config.run.extend_to_epochs is None:
        return config
    longer = {"max_epochs": config.run.extend_to_epochs, "max_steps": None}
    return config.model_copy(update={"trainer": config.trainer.model_copy(update=longer)})


def open_run_dir(config: AnyRun, dataset: ImageDataset) -> RunState:
    """Go on in the run folder, or see to it that a new run may begin there.

    Processes other than the first change nothing.

    Args:
        config: With its extension.
        dataset: As found now.

    Raises:
        UserError: The folder holds a run already, there is none to resume, the configuration or the images have
            changed, or all checkpoints are damaged.
    """
    run = config.run
    exists = (run.path / CONFIG).is_file()
    if not exists and any((run.path / "checkpoints").glob("*.ckpt")) and not run.overwrite:
        raise UserError(
            f"{run.path} holds checkpoints but no {CONFIG}: put that back, as the run had it, to go on; "
            "run.overwrite=true deletes all and starts anew, run.name=OTHER starts beside it"
        )
    if not (run.resume is True or (exists and (run.resume == "auto" or requeued()))):
        if is_rank_zero():
            prepare_run_dir(run)
            (run.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        return RunState(dataset, None, 0, config, [])
    if not exists:
        raise UserError(
            f"run.resume=true: {run.path} holds no run; start it without run.resume, or with run.resume=auto"
        )
    values = read_config(run.path)
    notes = compare_configs(values, config)
    length = {key: values["trainer"][key] for key in LENGTH}
    before = config.model_copy(update={"trainer": config.trainer.model_copy(update=length)})
    steps, steps_before = (make_plan(each, len(dataset)).total_steps for each in (config, before))
    if steps < steps_before:
        raise UserError(
            f"run.extend_to_epochs={run.extend_to_epochs} is {steps:,} steps, and the run has {steps_before:,} already"
        )
    dataset, more = check_dataset_unchanged(run, dataset)
    found = find_latest_checkpoint(run.path / "checkpoints")
    if found is None:
        if (run.path / "backbone.safetensors").exists():
            raise UserError(
                f"{run.path}: its checkpoints are gone. Put one back into checkpoints/ to go on; run.overwrite=true "
                "deletes all and starts anew, run.name=OTHER starts beside it"
            )
        return RunState(dataset, None, 0, before, [*notes, *more, "Nothing had been saved: the run starts anew"])
    if found.path.name != LAST and not found.damaged:
        notes.append(f"{LAST} is gone: {found.path.name} is taken")
    for path in found.damaged:
        notes.append(f"{path} is damaged: the one before it is taken")
        if is_rank_zero():  # or it would be kept as the one before
            path.replace(path.with_name(f"{path.name}.damaged"))
    notes += more
    return RunState(dataset, found.path, found.step, before, notes)


def write_run_metadata(config: AnyRun, dataset: ImageDataset) -> None:
    """Write down what the run is of: from here on the folder holds a run, which nothing overwrites unasked.

    The run that it replaces is deleted only now.
    """
    folder = config.run.path
    if isinstance(dataset, ImageFolder):
        dataset.names.save(folder / IMAGES)
    data = {"count": len(dataset), "fingerprint": dataset.fingerprint(sizes=False), "text": dataset.describe()}
    write_json(folder / DATA, data)
    with atomic_write(folder / CONFIG) as file:
        file.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode())
    restore_or_delete_replaced(config.run)


def prepare_run_dir(run: RunDirConfig) -> None:
    """See to it that the run folder holds no run; one that may be overwritten steps aside until `write_run_metadata`.

    Raises:
        UserError: It holds a run that may not be overwritten.
    """
    if (run.path / CONFIG).exists() or any((run.path / "checkpoints").glob("*.ckpt")):
        if not run.overwrite:
            raise UserError(
                f"{run.path} holds a run already. Three ways on: run.resume=true continues it, run.overwrite=true "
                "deletes it and starts anew, run.name=OTHER starts beside it"
            )
        run.path.rename(_aside(run))


def _aside(run: RunDirConfig) -> Path:
    """Where a run is that another one is about to replace."""
    return run.folder / f".{run.name}.replaced"


def restore_or_delete_replaced(run: RunDirConfig) -> None:
    """Delete the run that stepped aside if another one has begun in its place, else put it back."""
    if not _aside(run).is_dir():
        return
    if (run.path / CONFIG).exists():
        shutil.rmtree(_aside(run))
    else:
        shutil.rmtree(run.path, ignore_errors=True)
        _aside(run).rename(run.path)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run was started with.

    Raises:
        UserError: It is damaged.
    """
    try:
        values: dict[str, Any] = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if not values["trainer"].keys() >= LENGTH:
            raise ValueError("no configuration of a run")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        raise UserError(
            f"{folder / CONFIG} is damaged: put it back, as the run had it, to go on; `ssl-vit ... --cfg` prints the "
            "configuration of a command"
        ) from None
    return values


def compare_configs(before: dict[str, Any], now: AnyRun) -> list[str]:
    """What differs between the configuration of a run and the one that would continue it, without harm.

    Keys that only one of them knows, because it is of another version, do not count.

    Raises:
        UserError: Listing every key that would change the meaning of the run.
    """
    old, new = _flat(before), _flat(now.model_dump(mode="json"))
    changed = {key: f"{key}: {old[key]} -> {new[key]}" for key in old if key in new and old[key] != new[key]}
    length = {f"trainer.{key}" for key in LENGTH}
    extended = now.run.extend_to_epochs is not None
    harmful = [
        text
        for key, text in changed.items()
        if not (key.startswith(KEYS_ALLOWED_TO_CHANGE) or (extended and key in length))
        or (now.depends_on_num_processes and key in ("trainer.devices", "trainer.num_nodes"))
    ]
    if harmful:
        head = "run.resume=true: these keys differ from the run's config.yaml; set them back"
        epochs = before["trainer"]["max_epochs"]
        was_extended = epochs > now.trainer.max_epochs and not extended
        way = f"run.extend_to_epochs={epochs} goes on" if was_extended else "run.extend_to_epochs=N makes a run longer"
        hint = [f"({way})"] if length & changed.keys() and not extended else []
        raise UserError("\n  ".join([head, *harmful, *hint]))
    return [f"Changed: {text}" for key, text in changed.items() if not key.startswith("run.")]


def check_dataset_unchanged(run: RunConfig, found: ImageDataset) -> tuple[ImageDataset, list[str]]:
    """The images that the run goes on with, and what to say of them.

    Raises:
        UserError: They are not those that it began with, and run.keep_image_list is false.
    """
    try:
        before = json.loads((run.path / DATA).read_text(encoding="utf-8"))
        unchanged = found.fingerprint(sizes=False) == before["fingerprint"]
        head = f"run.resume=true: the images have changed, from {before['count']:,} to {len(found):,}"
        began = f"The run began with {before['text']}"
    except (OSError, ValueError, LookupError, TypeError):
        return found, [f"{run.path / DATA} cannot be read: whether the images are the same is not known"]
    if unchanged:
        return found, []
    try:
        names = PackedPaths.load(run.path / IMAGES)
    except (OSError, ValueError):
        names = None
    if names is None or not isinstance(found, ImageFolder):
        raise UserError(f"{head}. {began}; give it these, or start beside it with run.name=OTHER")
    old, new = set(names), set(found.names)
    difference = f"gone: {_some(old - new)}; new: {_some(new - old)}"
    if not run.keep_image_list:
        raise UserError(
            f"{head}. {difference}. Restore the folder, or run.keep_image_list=true goes on with the list that the run "
            "began with: those gone are skipped and counted, new ones left out"
        )
    return found.with_names(names), [f"The images have changed ({difference}); the run keeps its own list"]


def _some(names: set[bytes], most: int = 3) -> str:
    """`3 (a.jpg, b.jpg, ...)`."""
    if not names:
        return "none"
    shown = [escape_path(name) for name in sorted(names)[:most]] + (["..."] if len(names) > most else [])
    return f"{len(names):,} ({', '.join(shown)})"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
