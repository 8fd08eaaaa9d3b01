"""A network, the labelled pictures that it is measured on, and the baselines beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.config_evaluation import DescribedConfig, EvaluationConfig, LabelledConfig
from ssl_vit.data.find import LabelledSplit, find_labelled
from ssl_vit.data.pictures import Pictures, SkippedPictures
from ssl_vit.errors import PartDone, UserError
from ssl_vit.evaluation.baselines import Pixels, centred, mean_of
from ssl_vit.evaluation.features import Describer, Features, NetworkTokens, check_health, check_size, on_best_device
from ssl_vit.evaluation.filling import Filled, filled
from ssl_vit.evaluation.store import Store, features_folder, stores_of
from ssl_vit.models.weights import LoadedBackbone, load_backbone, random_twin
from ssl_vit.processes import place_in_launch
from ssl_vit.records import provenance
from ssl_vit.records.mistakes import Mistakes
from ssl_vit.records.naming import data_name, record_path
from ssl_vit.records.record import Record, Score, beside
from ssl_vit.records.replaced import make_way
from ssl_vit.records.sheet import hardest_tiles, write_sheet
from ssl_vit.training.hardware import best_device, take_own_gpu
from ssl_vit.transforms.evaluation import EvalTransform

BLOCKS = 4  # last blocks whose [CLS] is stored at least, so that all evaluations share one pass
NETWORK, RANDOM, PIXELS = "network", "random init", "raw pixels"


class Source(NamedTuple):
    """Features of one origin, of all pictures that could be read."""

    name: str
    train: Features
    test: Features | None  # None: there is but one set of pictures


@dataclass(frozen=True)
class Study:
    """One evaluation from its start to its record."""

    task: str
    config: LabelledConfig
    loaded: LoadedBackbone
    pictures: LabelledSplit
    transform: EvalTransform
    out: Path
    started: float  # seconds of the process's clock

    @classmethod
    def begin(cls, task: str, config: LabelledConfig) -> Study:
        """Load the network and find the pictures.

        Raises:
            UserError: Either is not there, or they do not fit each other.
        """
        started = time.perf_counter()
        loaded, transform = load_network(config)
        out = config.out or record_path(task, config, loaded)
        for path in (out, beside(out, ".npz"), beside(out, ".png")):
            if path.exists() and not path.is_file():
                raise UserError(f"out={out}: {path} is no file that could be replaced; name another record")
        return cls(task, config, loaded, find_labelled(config.data), transform, out, started)

    def sources(self, *, blocks: int) -> Iterator[Source]:
        """The network's features with [CLS] of some last blocks; with baselines then its random twin's, and raw pixels.

        What is stored already is taken, all else stored. The float16 features are mapped from files: take what you
        need, then its `.float()`, and never write into them.

        Raises:
            UserError: The network's features have diverged or collapsed, or fewer than two classes can be read.
            PartDone: Another process of this launch goes on to the evaluation.
        """
        assert isinstance(self.config, EvaluationConfig)  # fine-tuning has no frozen features
        if place_in_launch()[0]:
            for _, describe in self._describers(blocks):
                stored(describe, self.pictures, config=self.config, run=self.loaded.run)
            raise PartDone
        for name, describe in self._describers(blocks):
            sets = stored(describe, self.pictures, config=self.config, run=self.loaded.run)
            stores = [found.store for found in sets]
            train, *rest = (store.features(blocks=min(blocks, describe.blocks)) for store in stores)
            test = rest[0] if rest else None
            if name == NETWORK:
                self._list_skipped(stores)
                self._check(train, test)
            if name == PIXELS:
                mean = mean_of(train)
                train, test = centred(train, mean), None if test is None else centred(test, mean)
            yield Source(name, train, test)

    def finish(
        self,
        scores: Sequence[Score],
        *,
        protocol: dict[str, Any],
        train_labels: Tensor,
        test_labels: Tensor,
        findings: dict[str, Any],
        warnings: Sequence[str],
        engines: dict[str, str] | None = None,
        selection: dict[str, Any] | None = None,
        seeds: Mapping[str, int | list[int]] | None = None,
        by_class: str | None = None,
        sheet: bool = False,
    ) -> Record:
        """Write the record to `out`.

        Args:
            scores: The network's, then those of the baselines.
            protocol: All that decides over the numbers, but network, pictures and transform.
            train_labels: Of the pictures that were learned from.
            test_labels: Of those that were tested on.
            findings: What else was found out about the pictures.
            warnings: What a reader of the numbers must know.
            engines: Which of several ways to the same numbers was taken, by what for.
            selection: What was chosen (`chosen`), and by which pictures (`on`); None: nothing was.
            seeds: Beside those of the pretraining and of the evaluation.
            by_class: What follows "top-1" in the metric whose mistakes are told class by class.
            sheet: Also draw them, as a PNG beside the record.
        """
        transform = self.transform.describe()
        del transform["mean"], transform["std"]  # of the network, where they are told
        answers = None if by_class is None else scores[0].answers[by_class]
        told = answers and Mistakes(f"top-1{by_class}", self._asked().classes, answers.truth, answers.predicted)
        drawing = beside(self.out, ".png")
        record = Record(
            task=self.task,
            protocol={**protocol, "transform": transform},
            model=provenance.network(self.loaded, self.config.checkpoint, self.config.weights),
            data={**self._data(train_labels, test_labels), **findings},
            seeds={**self._seeds(), **(seeds or {})},
            score=scores[0],
            baselines=list(scores[1:]),
            cost=provenance.cost(self.started, best_device()),
            environment={**provenance.environment(best_device()), **(engines or {})},
            warnings=[*self._skip_warnings(), *_classes_apart(train_labels, test_labels), *warnings],
            selection=selection,
            config=self.config.model_dump(mode="json", exclude={"out"}),
            by_class=None if told is None else {**told.describe(), "sheet": drawing.name if sheet else None},
        )
        make_way(self.out, record)
        record.write(self.out)
        drawing.unlink(missing_ok=True)
        if told and answers and sheet:
            title = f"{record.model['name']}: {self.task}, {told.metric}, on {record.data['name']}"
            write_sheet(drawing, told, hardest_tiles(answers, self._asked()), title)
        return record

    def _seeds(self) -> dict[str, int | None]:
        return {"pretrain": provenance.pretraining_seed(self.loaded.run), "evaluation": self.config.seed}

    def _data(self, train_labels: Tensor, test_labels: Tensor) -> dict[str, Any]:
        """What a record says of the pictures; their folders as they were named."""
        given = self.config.data
        return {
            "name": data_name(given),
            "root": str(given.root or given.train),
            **({} if given.test is None else {"test": str(given.test)}),
            "n_train": len(train_labels),
            "n_test": len(test_labels),
            "n_classes": len(torch.unique(torch.cat([train_labels, test_labels]))),
            "fingerprints": [part.fingerprint(sizes=True) for part in self.pictures if part is not None],
            "skipped": sum(part.count() for part in self._skipped()),
        }

    def _asked(self) -> Pictures:
        """The pictures that answers are of."""
        return self.pictures.train if self.pictures.test is None else self.pictures.test

    def _describers(self, blocks: int) -> Iterator[tuple[str, Describer]]:
        """What says something of the pictures, made when it is its turn."""
        assert isinstance(self.config, EvaluationConfig)
        network = on_best_device(self.loaded)
        blocks = max(blocks, min(BLOCKS, len(network.backbone.vit.blocks)))
        yield NETWORK, NetworkTokens(network, self.transform, blocks=blocks)
        if self.config.baselines:
            twin = on_best_device(random_twin(self.loaded, self.config.seed))
            yield RANDOM, NetworkTokens(twin, self.transform, blocks=blocks)
            yield PIXELS, Pixels(self.transform, channels=self.loaded.backbone.config.in_chans)

    def _list_skipped(self, stores: Sequence[Store]) -> None:
        """List the pictures that cannot be read beside the record, whether they were found now or long ago."""
        for part in self._skipped():
            part.path.unlink(missing_ok=True)
        for part, store in zip(self._skipped(), stores, strict=False):
            for broken in store.broken():
                part.record(broken)

    def _check(self, train: Features, test: Features | None) -> None:
        """Refuse features and labels that no evaluation can say anything of."""
        check_health(train, self.loaded.source)
        if test is not None:
            check_health(test, self.loaded.source)
        if len(torch.unique(train.labels)) < 2:
            raise UserError(
                f"{data_name(self.config.data)}: all pictures that can be read are of one class; two are needed"
            )

    def _skipped(self) -> tuple[SkippedPictures, SkippedPictures]:
        """The lists of the pictures that could not be read, beside the record."""
        train, test = (self.out.with_name(f"{self.out.stem}-skipped-{part}.txt") for part in ("train", "test"))
        return SkippedPictures(train), SkippedPictures(test)

    def _skip_warnings(self) -> list[str]:
        return [
            f"{count:,} pictures could not be read: {part.path}" for part in self._skipped() if (count := part.count())
        ]


def load_network(config: LabelledConfig | DescribedConfig) -> tuple[LoadedBackbone, EvalTransform]:
    """The network, and what pictures go through before it.

    Raises:
        UserError: There is none, or the size of the pictures does not fit it.
    """
    take_own_gpu()
    loaded = load_backbone(config.checkpoint, config.weights)
    image_size = config.data.image_size or loaded.backbone.config.img_size
    check_size(image_size, loaded.backbone.patch_size)
    return loaded, EvalTransform(image_size, config.data.crop_ratio, loaded.mean, loaded.std)


def stored(
    describe: Describer, pictures: LabelledSplit, *, config: EvaluationConfig | DescribedConfig, run: Path | None
) -> list[Filled]:
    """What is said of the pictures to learn from, and of those to test on if there are such: stored now or before."""
    folder, name = features_folder(config.features, run), data_name(config.data)
    return [
        filled(
            stores_of(describe, some, folder=folder, name=f"{name}-{part}"),
            batch_size=config.data.batch_size,
            workers=config.data.workers,
        )
        for part, some in zip(LabelledSplit._fields, pictures, strict=True)
        if some is not None
    ]


def _classes_apart(train_labels: Tensor, test_labels: Tensor) -> list[str]:
    """Warnings of classes that stand on one side only."""
    known = torch.unique(train_labels)
    strangers = int((~torch.isin(test_labels, known)).sum())
    untested = int((~torch.isin(known, test_labels)).sum())
    texts = []
    if strangers:
        texts.append(f"{strangers:,} test pictures are of classes without training pictures: they count as wrong")
    if untested:
        texts.append(f"{untested:,} of {len(known):,} classes have no test pictures: nothing is said of them")
    return texts
