"""`ssl-vit transfer`: linear probes of several models on several datasets, as a table with random-init models below.

ssl-vit transfer 'checkpoints=[runs/a,runs/b]' 'data.roots=[labeled/a,labeled/b]'
ssl-vit transfer 'checkpoints=[runs/a,timm:vit_small_patch16_224.dino]' 'data.roots=[cifar10:data,cifar100:data]'
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ssl_vit import __version__
from ssl_vit.commands import linear
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import LinearConfig, TransferConfig
from ssl_vit.config.pretrain import Source
from ssl_vit.data.dataset_factory import build_labeled_splits
from ssl_vit.evaluation.transfer import TransferResult, pretraining_images, short_names, transfer_table
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.errors import AllRanksError, UserError
from ssl_vit.runtime.launch import torchrun_rank

# Keys of `linear` that do not change the numbers of a cell, or are represented by a hash; and those set by `transfer`.
_NOT_IN_KEY = {"checkpoint", "out", "features", "baselines", "data"}
_OWN_KEYS = {"checkpoint", "out", "baselines", "data", "eval_data", "seed", "weights"}


class Model(NamedTuple):
    """A row of the table."""

    name: str
    checkpoint: str
    identity: dict[str, Any]  # equal for equal weights
    pretrained_on: tuple[str, Path] | None  # source and root of its images


class EvalDataset(NamedTuple):
    """A column of the table."""

    name: str
    source: str
    root: Path
    fingerprints: list[str]
    probe: LinearConfig  # without checkpoint and output


@dataclass(frozen=True)
class TransferCell:
    """A model and a dataset."""

    model: Model
    data: EvalDataset
    path: Path  # of the result

    @property
    def in_domain(self) -> bool:
        """Whether the model was pretrained on these images."""
        root = self.data.root.resolve()
        return self.model.pretrained_on in [(self.data.source, root), (self.data.source, root / "train")]

    def cache_key(self) -> str:
        """Return a hash of everything that determines the result."""
        probe = self.data.probe.model_dump(mode="json", exclude=_NOT_IN_KEY)
        crop = self.data.probe.data.crop_ratio
        parts = [__version__, probe, crop, self.model.identity, self.data.source, self.data.fingerprints]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def load_cached(self) -> TransferResult | None:
        """Return the result of an earlier call if it has the same key."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            if content.get("cache_key") != self.cache_key():
                return None
        except (OSError, ValueError, AttributeError):  # missing, or not a result
            return None
        return TransferResult.from_json(content, in_domain=self.in_domain)

    def evaluate(self) -> TransferResult:
        """Run `linear` and add the key to its result."""
        linear.evaluate(self.data.probe.model_copy(update={"checkpoint": self.model.checkpoint, "out": self.path}))
        content = json.loads(self.path.read_text(encoding="utf-8"))
        write_json(self.path, {**content, "cache_key": self.cache_key()})
        return TransferResult.from_json(content, in_domain=self.in_domain)


def main(config: TransferConfig) -> None:
    """Run the command.

    Raises:
        AllRanksError: Started in several processes.
        UserError: A model or a dataset is missing, or pairs failed.
    """
    if torchrun_rank()[1] > 1:
        raise AllRanksError("transfer runs in one process; run `ssl-vit features` under torchrun before it")
    models, datasets = _load_models(config), _find_datasets(config)
    cells = [
        TransferCell(model, data, config.out / f"{model.name}-{data.name}.json")
        for model in models
        for data in datasets
    ]
    cached = [cell.load_cached() for cell in cells]
    print(f"{len(cells)} pairs, {sum(result is not None for result in cached)} of them already evaluated", flush=True)
    results: dict[tuple[str, str], TransferResult] = {}
    failures = []
    for cell, result in zip(cells, cached, strict=True):
        names = cell.model.name, cell.data.name
        try:
            results[names] = result or cell.evaluate()
        except UserError as error:
            failures.append(f"{names[0]} on {names[1]}: {error}")
            continue
        if result is None:
            print(f"{names[0]} on {names[1]}: {results[names].label()}", flush=True)
    table = transfer_table([model.name for model in models], [data.name for data in datasets], results)
    content = [
        {
            "model": cell.model.name,
            "checkpoint": cell.model.checkpoint,
            "data": cell.data.name,
            "root": str(cell.data.root),
            "result": cell.path.name,
            **results[names]._asdict(),
        }
        for cell in cells
        if (names := (cell.model.name, cell.data.name)) in results
    ]
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "transfer.json", {"schema": 2, "task": "transfer", "cells": content})
    with atomic_write(config.out / "transfer.md") as file:
        file.write(f"{table}\n".encode())
    print(f"\n{table}\n\n{config.out / 'transfer.md'}")
    if failures:
        raise UserError("\n  ".join(["these pairs failed, all others are written", *failures]))


def _load_models(config: TransferConfig) -> list[Model]:
    """Return the models in the given order, then a random-init model of each architecture.

    Raises:
        UserError: A model cannot be loaded.
    """
    names = short_names([_path_parts(checkpoint) for checkpoint in config.checkpoints])
    models: list[Model] = []
    architectures: dict[str, Model] = {}
    for name, checkpoint in zip(names, config.checkpoints, strict=True):
        loaded = load_backbone(checkpoint, config.weights)
        models.append(Model(name, checkpoint, _identity(loaded), pretraining_images(loaded.run)))
        random_init = _identity(loaded) | {"sha256": None, "source": "random weights, seed 0"}
        untrained = Model(f"random-init-{name}", f"random:{checkpoint.removeprefix('timm:')}", random_init, None)
        architectures.setdefault(json.dumps(random_init), untrained)
    if len(architectures) == 1:
        return [*models, next(iter(architectures.values()))._replace(name="random-init")]
    return [*models, *architectures.values()]


def _identity(loaded: LoadedBackbone) -> dict[str, Any]:
    return {
        "sha256": loaded.sha256,
        "source": None if loaded.sha256 else loaded.source,
        "backbone": loaded.backbone.config.model_dump(mode="json", exclude={"drop_path"}),  # only used in training
        "normalization": [loaded.mean, loaded.std],
    }


def _path_parts(checkpoint: str) -> tuple[str, ...]:
    """Return the parts of a path, or the name of a timm model as one part."""
    if checkpoint.partition(":")[0] in ("timm", "random"):
        return (checkpoint,)
    path = Path(checkpoint).resolve()
    return (*path.parts[1:-1], path.stem if path.is_file() else path.name)


def _find_datasets(config: TransferConfig) -> list[EvalDataset]:
    """Return the datasets in the given order, each with the config of its probes.

    Raises:
        UserError: A dataset is missing or has no classes, or a key of the probe is invalid.
    """
    for override in config.linear:
        if override.partition("=")[0].partition(".")[0] in _OWN_KEYS:
            raise UserError(f"linear=[{override}]: set this key in `ssl-vit transfer` itself")
    locations = [_source_and_root(text) for text in config.data.roots]
    parts = [(*root.resolve().parts[1:], *([] if source == "folder" else [source])) for source, root in locations]
    datasets = []
    for name, (source, root) in zip(short_names(parts), locations, strict=True):
        shared = [f"data.{key}={getattr(config.data, key)}" for key in ("batch_size", "num_workers", "crop_ratio")]
        fixed = ["baselines=false", "figure=false", f"seed={config.seed}", f"weights={config.weights}", "checkpoint=-"]
        overrides = [f"data.source={source}", f"data.root={root}", *shared, *config.linear, *fixed]
        probe = load_config("linear", overrides, LinearConfig)
        splits = [split for split in build_labeled_splits(probe.data) if split is not None]
        prints = [split.fingerprint(sizes=True, times=True) for split in splits]
        datasets.append(EvalDataset(name, source, root, prints, probe))
    return datasets


def _source_and_root(text: str) -> tuple[str, Path]:
    """Parse `cifar10:FOLDER`; text without the prefix of a source is a folder."""
    source, colon, root = text.partition(":")
    if not colon or source not in get_args(Source):
        return "folder", Path(text)
    if not root:
        raise UserError(f"data.roots: {text} needs a folder, as {text}FOLDER")
    return source, Path(root)
