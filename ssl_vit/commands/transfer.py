"""`ssl-vit transfer`: linear probes of several models on several datasets, as a table with random-init models below.

ssl-vit transfer 'checkpoints=[runs/a,runs/b]' 'data.roots=[labeled/a,labeled/b]'
ssl-vit transfer 'checkpoints=[runs/a,timm:vit_small_patch16_224.dino]' 'data.roots=[cifar10:data,cifar100:data]'
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ssl_vit import __version__
from ssl_vit.commands import linear
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import LinearConfig, TransferConfig
from ssl_vit.config.pretrain import Source
from ssl_vit.data.dataset_factory import build_labeled_splits
from ssl_vit.evaluation.results.provenance import run_config
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.errors import AllRanksError, UserError
from ssl_vit.runtime.launch import torchrun_rank
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.runtime.text import Bold, format_table

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


class TransferResult(NamedTuple):
    """Accuracy of a linear probe on one model and dataset."""

    value: float  # accuracy in [0, 1]
    low: float  # 95 % interval
    high: float
    n: int  # test images
    split: str
    warnings: list[str]
    in_domain: bool  # whether the model was pretrained on these images

    def label(self) -> str:
        """Return the accuracy and its interval in percent, in bold if in-domain."""
        text = f"{100 * self.value:.1f} ± {50 * (self.high - self.low):.1f}"
        return Bold(text) if self.in_domain else text


class TransferCell(NamedTuple):
    """A model and a dataset."""

    model: Model
    data: EvalDataset
    path: Path  # of the result

    @property
    def names(self) -> tuple[str, str]:
        """Names of the row and the column."""
        return self.model.name, self.data.name

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
            return self._to_result(content) if content.get("cache_key") == self.cache_key() else None
        except (OSError, ValueError, AttributeError):  # missing, or not a result
            return None

    def evaluate(self) -> TransferResult:
        """Run `linear` and add the key to its result."""
        linear.evaluate(self.data.probe.model_copy(update={"checkpoint": self.model.checkpoint, "out": self.path}))
        content = json.loads(self.path.read_text(encoding="utf-8"))
        write_json(self.path, {**content, "cache_key": self.cache_key()})
        return self._to_result(content)

    def _to_result(self, content: dict[str, Any]) -> TransferResult:
        metric, root = content["score"]["metrics"][0], self.data.root.resolve()
        return TransferResult(
            **{key: metric[key] for key in ("value", "low", "high", "n")},
            split=content["protocol"]["split"],
            warnings=content["warnings"],
            in_domain=self.model.pretrained_on in [(self.data.source, root), (self.data.source, root / "train")],
        )


def main(config: TransferConfig) -> None:
    """Run the command.

    Raises:
        AllRanksError: Started in several processes.
        UserError: A model or a dataset is missing, or pairs failed.
    """
    if torchrun_rank()[1] > 1:
        raise AllRanksError("transfer runs in one process; run `ssl-vit features` under torchrun before it")
    tables = [config.out / "transfer.json", config.out / "transfer.md"]
    check_outputs(tables, "transfer", inputs={}, is_own=_is_transfer(tables[0]))
    models, datasets = _load_models(config), _find_datasets(config)
    cells = [
        TransferCell(model, data, config.out / f"{model.name}-{data.name}.json")
        for model in models
        for data in datasets
    ]
    cached = [cell.load_cached() for cell in cells]
    print(f"{len(cells)} pairs, {sum(result is not None for result in cached)} of them already evaluated", flush=True)
    results: dict[tuple[str, str], TransferResult] = {}
    content, failures = [], []
    for cell, known in zip(cells, cached, strict=True):
        row, column = cell.names
        try:
            result = known or cell.evaluate()
        except UserError as error:
            failures.append(f"{row} on {column}: {error}")
            continue
        if not known:
            print(f"{row} on {column}: {result.label()}", flush=True)
        results[row, column] = result
        place = {"model": row, "checkpoint": cell.model.checkpoint, "data": column, "root": str(cell.data.root)}
        content.append({**place, "result": cell.path.name, **result._asdict()})
    table = transfer_table([model.name for model in models], [data.name for data in datasets], results)
    record_outputs(tables, "transfer")
    write_json(config.out / "transfer.json", {"schema": 2, "task": "transfer", "cells": content})
    with atomic_write(config.out / "transfer.md") as file:
        file.write(f"{table}\n".encode())
    print(f"\n{table}\n\n{config.out / 'transfer.md'}")
    if failures:
        raise UserError("\n  ".join(["these pairs failed, all others are written", *failures]))


def transfer_table(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], TransferResult]) -> str:
    """Return a Markdown table with a row per model, a column per dataset, a dash for missing cells, and notes below."""
    headers, notes = ["accuracy in %"], []
    for column in columns:
        results = [cell for (_, data), cell in cells.items() if data == column]
        counts = " or ".join(f"{n:,}" for n in sorted({cell.n for cell in results}))
        headers.append(f"{column} (n = {counts})" if counts else column)
        notes += [f"{column}: {split}." for split in sorted({cell.split for cell in results} - {"train and test"})]
    labels = {names: cell.label() for names, cell in cells.items()}
    lines = [[row, *(labels.get((row, column), "–") for column in columns)] for row in rows]
    text = [format_table(lines, headers, style="markdown"), ""]
    text.append("Linear probes on frozen features; ± is half of the 95 % interval over test images.")
    if any(cell.in_domain for cell in cells.values()):
        text.append("**bold**: images that the model was pretrained on, without their labels.")
    text += notes
    text += [f"warning: {row} on {data}: {text}" for (row, data), cell in cells.items() for text in cell.warnings]
    return "\n".join(text)


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


def pretraining_images(run: Path | None) -> tuple[str, Path] | None:
    """Return source and root of the images in a run's `config.yaml`; None if unknown."""
    data = run_config(run).get("data")
    if not isinstance(data, dict) or not {"source", "root"} <= data.keys():
        return None
    return str(data["source"]), Path(str(data["root"])).resolve()


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
    shared = [f"data.{key}={getattr(config.data, key)}" for key in ("batch_size", "num_workers", "crop_ratio")]
    fixed = ["baselines=false", "figure=false", f"seed={config.seed}", f"weights={config.weights}", "checkpoint=-"]
    datasets = []
    for name, (source, root) in zip(short_names(parts), locations, strict=True):
        overrides = [f"data.source={source}", f"data.root={root}", *shared, *config.linear, *fixed]
        probe = load_config("linear", overrides, LinearConfig)
        splits = [split for split in build_labeled_splits(probe.data) if split is not None]
        prints = [split.fingerprint(sizes=True, times=True) for split in splits]
        datasets.append(EvalDataset(name, source, root, prints, probe))
    return datasets


def _is_transfer(path: Path) -> bool:
    """Return whether a file is the table of an earlier command."""
    try:
        return bool(json.loads(path.read_bytes())["task"] == "transfer")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _source_and_root(text: str) -> tuple[str, Path]:
    """Parse `cifar10:FOLDER`; text without the prefix of a source is a folder."""
    source, colon, root = text.partition(":")
    if not colon or source not in get_args(Source):
        return "folder", Path(text)
    if not root:
        raise UserError(f"data.roots: {text} needs a folder, as {text}FOLDER")
    return source, Path(root)


def _path_parts(checkpoint: str) -> tuple[str, ...]:
    """Return the parts of a path, or the name of a timm model as one part."""
    if checkpoint.partition(":")[0] in ("timm", "random"):
        return (checkpoint,)
    path = Path(checkpoint).resolve()
    return (*path.parts[1:-1], path.stem if path.is_file() else path.name)


def short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Return names for files and tables: as many last parts of each path as distinguish all of them.

    Example:
        >>> short_names([("runs", "a"), ("runs", "b")]), short_names([("x", "a"), ("y", "a")])
        (['a', 'b'], ['x-a', 'y-a'])

    Raises:
        UserError: Two are equal.
    """
    names: list[str] = []
    for depth in range(1, max(map(len, paths)) + 1):
        names = [re.sub(r"[^\w.+-]+", "-", "-".join(parts[-depth:])) for parts in paths]
        if len(set(names)) == len(names):
            return names
    duplicate = next(name for name in names if names.count(name) > 1)
    raise UserError(f"{duplicate} occurs twice (or two names differ in punctuation only); use each once")
