"""`ssl-vit transfer`: models pretrained on one dataset, probed on others; a table with random models below.

ssl-vit transfer 'checkpoints=[runs/a,runs/b]' 'data.roots=[labeled/a,labeled/b]'
ssl-vit transfer 'checkpoints=[runs/a,timm:vit_small_patch16_224.dino]' 'data.roots=[cifar10:data,cifar100:data]'
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from ssl_vit import __version__
from ssl_vit.commands import linear
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import LinearConfig, TransferConfig
from ssl_vit.config.pretrain import Source
from ssl_vit.data.dataset_factory import build_labeled_splits
from ssl_vit.evaluation.transfer import TransferResult, pretrained_on, short_names, table
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.errors import AllRanksError, UserError
from ssl_vit.runtime.launch import torchrun_rank

# What decides over no number of a pair, or stands for it by a hash.
_PLACES = {"checkpoint", "out", "features", "baselines", "data"}
_OURS = {"checkpoint", "out", "baselines", "data", "labeled", "seed", "weights"}


class Model(NamedTuple):
    """A row of the table."""

    name: str
    checkpoint: str
    identity: dict[str, Any]  # equal for equal weights
    own: tuple[str, Path] | None  # kind and place of the images that it was pretrained on


class EvalDataset(NamedTuple):
    """A column of the table."""

    name: str
    source: str
    root: Path
    fingerprints: list[str]


@dataclass(frozen=True)
class TransferCell:
    """A cell of the table."""

    model: Model
    data: EvalDataset
    probe: LinearConfig

    @property
    def own(self) -> bool:
        """Whether the model was pretrained on these images."""
        root = self.data.root.resolve()
        return self.model.own in [(self.data.source, root), (self.data.source, root / "train")]

    def asked(self) -> str:
        """A hash of all that decides over the result."""
        probe = self.probe.model_dump(mode="json", exclude=_PLACES)
        crop = self.probe.data.crop_ratio
        parts = [__version__, probe, crop, self.model.identity, self.data.source, self.data.fingerprints]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def stored(self) -> dict[str, Any] | None:
        """The record of this very pair, if it is there."""
        try:
            record: dict[str, Any] = json.loads(_file(self.probe).read_text(encoding="utf-8"))
            return record if record.get("asked") == self.asked() else None
        except (OSError, ValueError, AttributeError):  # none, or half of one that something else wrote
            return None

    def measured(self) -> dict[str, Any]:
        """The record, computed and stored with what was asked for."""
        linear.measure(self.probe)
        path = _file(self.probe)
        record = {**json.loads(path.read_text(encoding="utf-8")), "asked": self.asked()}
        write_json(path, record)
        return record


def main(config: TransferConfig) -> None:
    """Run the command.

    Raises:
        AllRanksError: Several processes were started.
        UserError: A model or a data set is not there, or pairs failed.
    """
    if torchrun_rank()[1] > 1:
        raise AllRanksError("transfer is one process; `ssl-vit features` under torchrun describes the images before it")
    models, sets = _models(config), _data_sets(config)
    pairs = [TransferCell(model, data, _probe(config, model, data)) for model in models for data in sets]
    stored = [pair.stored() for pair in pairs]
    print(f"{len(pairs)} pairs, {sum(record is not None for record in stored)} of them there already", flush=True)
    cells: dict[tuple[str, str], TransferResult] = {}
    failures = []
    for pair, record in zip(pairs, stored, strict=True):
        names = pair.model.name, pair.data.name
        try:
            cells[names] = TransferResult.of(record or pair.measured(), own=pair.own)
        except UserError as error:
            failures.append(f"{names[0]} on {names[1]}: {error}")
            continue
        if record is None:
            print(f"{names[0]} on {names[1]}: {cells[names]}", flush=True)
    text = table([model.name for model in models], [data.name for data in sets], cells)
    _write(config.out, pairs, cells, text)
    print(f"\n{text}\n\n{config.out / 'transfer.md'}")
    if failures:
        raise UserError("\n  ".join(["these pairs failed, all others are stored", *failures]))


def _models(config: TransferConfig) -> list[Model]:
    """The models in the order given, then a random one of each architecture.

    Raises:
        UserError: One cannot be loaded.
    """
    names = short_names([_parts(checkpoint) for checkpoint in config.checkpoints])
    models: list[Model] = []
    architectures: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for name, checkpoint in zip(names, config.checkpoints, strict=True):
        loaded = load_backbone(checkpoint, config.weights)
        models.append(Model(name, checkpoint, _identity(loaded), _own(loaded)))
        untrained = f"random:{checkpoint.removeprefix('timm:')}"
        twin = _identity(loaded) | {"sha256": None, "source": "random weights, seed 0"}
        architectures.setdefault(json.dumps(twin), (name, untrained, twin))
    alone = len(architectures) == 1
    for name, untrained, twin in architectures.values():
        models.append(Model("random-init" if alone else f"random-init-{name}", untrained, twin, None))
    return models


def _identity(loaded: LoadedBackbone) -> dict[str, Any]:
    return {
        "sha256": loaded.sha256,
        "source": None if loaded.sha256 else loaded.source,
        "backbone": loaded.backbone.config.model_dump(mode="json", exclude={"drop_path"}),  # only of training
        "normalization": [loaded.mean, loaded.std],
    }


def _own(loaded: LoadedBackbone) -> tuple[str, Path] | None:
    if loaded.run is None:
        return None
    try:
        return pretrained_on(yaml.safe_load((loaded.run / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _data_sets(config: TransferConfig) -> list[EvalDataset]:
    """The data sets in the order given.

    Raises:
        UserError: One is not there, or has no classes.
    """
    places = [_source_and_root(text) for text in config.data.roots]
    names = short_names(
        [(*root.resolve().parts[1:], *([] if source == "folder" else [source])) for source, root in places]
    )
    sets = []
    for name, (source, root) in zip(names, places, strict=True):
        data = load_config("linear", [*_data_words(config, source, root), "checkpoint=none"], LinearConfig).data
        prints = [part.fingerprint(sizes=True, times=True) for part in build_labeled_splits(data) if part is not None]
        sets.append(EvalDataset(name, source, root, prints))
    return sets


def _source_and_root(text: str) -> tuple[str, Path]:
    """`cifar10:FOLDER` as a data set of torchvision; what begins with no kind is a folder."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in get_args(Source):
        return "folder", Path(text)
    if not rest:
        raise UserError(f"data.roots: {text} needs a folder, as {text}FOLDER")
    return kind, Path(rest)


def _parts(checkpoint: str) -> tuple[str, ...]:
    """The parts of a path, or the one name of what is none."""
    if checkpoint.partition(":")[0] in ("timm", "random"):
        return (checkpoint,)
    path = Path(checkpoint).resolve()
    return (*path.parts[1:-1], path.stem if path.is_file() else path.name)


def _data_words(config: TransferConfig, source: str, root: Path) -> list[str]:
    data = config.data
    return [
        f"data.source={source}",
        f"data.root={root}",
        f"data.batch_size={data.batch_size}",
        f"data.num_workers={data.num_workers}",
        f"data.crop_ratio={data.crop_ratio}",
    ]


def _probe(config: TransferConfig, model: Model, data: EvalDataset) -> LinearConfig:
    """The `linear` command of a pair."""
    for word in config.linear:
        if word.partition("=")[0].partition(".")[0] in _OURS:
            raise UserError(f"linear=[{word}]: this key is one of `ssl-vit transfer` itself")
    words = [
        *_data_words(config, data.source, data.root),
        *config.linear,
        "baselines=false",
        "figure=false",
        f"seed={config.seed}",
        f"checkpoint={model.checkpoint}",
        f"weights={config.weights}",
        f"out={config.out / f'{model.name}-{data.name}.json'}",
    ]
    return load_config("linear", words, LinearConfig)


def _file(probe: LinearConfig) -> Path:
    assert probe.out is not None  # `_probe` names it
    return probe.out


def _write(out: Path, pairs: Sequence[TransferCell], cells: dict[tuple[str, str], TransferResult], text: str) -> None:
    """The table as Markdown and as JSON."""
    content = [
        {
            "model": pair.model.name,
            "checkpoint": pair.model.checkpoint,
            "data": pair.data.name,
            "root": str(pair.data.root),
            "record": _file(pair.probe).name,
            **cells[names]._asdict(),
        }
        for pair in pairs
        if (names := (pair.model.name, pair.data.name)) in cells
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "transfer.json", {"schema": 1, "task": "transfer", "cells": content})
    with atomic_write(out / "transfer.md") as file:
        file.write(f"{text}\n".encode())
