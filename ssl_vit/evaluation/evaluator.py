"""A model, the labeled images that it is measured on, and the baselines beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.config.evaluate import EvaluationConfig, FeatureCommandConfig, LabeledEvalConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.dataset_factory import TrainTestSplit, build_labeled_splits
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.features.cache import FeatureCache, candidate_caches, features_folder
from ssl_vit.evaluation.features.cache_writer import FillResult, fill_cache
from ssl_vit.evaluation.features.extractor import (
    BackboneExtractor,
    FeatureExtractor,
    Features,
    check_size,
    on_best_device,
    validate_features,
)
from ssl_vit.evaluation.features.raw_pixels import RawPixelExtractor, center_cls, mean_cls
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.confusion_matrix import ConfusionSummary
from ssl_vit.evaluation.results.eval_result import (
    DataInfo,
    EvalResult,
    ModelInfo,
    ModelScores,
    Selection,
    archive_previous_result,
    sibling_path,
)
from ssl_vit.evaluation.results.provenance import data_name, result_path
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone, random_init_like
from ssl_vit.runtime.device import best_device, set_local_device
from ssl_vit.runtime.errors import RankFinished, UserError
from ssl_vit.runtime.launch import torchrun_rank
from ssl_vit.visualization.confusion_figure import plot_confusion, read_hardest_images

BLOCKS = 4  # last blocks whose [CLS] is stored at least, so that all evaluations share one pass
MODEL, RANDOM, PIXELS = "model", "random init", "raw pixels"


class FeatureSource(NamedTuple):
    """Features of one origin, of all images that could be read."""

    name: str
    train: Features
    test: Features | None  # None: there is but one dataset


@dataclass(frozen=True)
class Evaluation:
    """One evaluation from its start to its record."""

    task: str
    config: LabeledEvalConfig
    loaded: LoadedBackbone
    dataset: TrainTestSplit
    transform: EvalTransform
    out: Path
    started: float  # seconds of the process's clock

    @classmethod
    def begin(cls, task: str, config: LabeledEvalConfig, dataset: TrainTestSplit | None = None) -> Evaluation:
        """Load the model and find the images.

        Raises:
            UserError: Either is not there, or they do not fit each other.
        """
        started = time.perf_counter()
        loaded, transform = load_model(config)
        out = config.out or result_path(task, config, loaded)
        for path in (out, sibling_path(out, ".npz"), sibling_path(out, ".png")):
            if path.exists() and not path.is_file():
                raise UserError(f"out={out}: {path} is no file that could be replaced; name another record")
        return cls(task, config, loaded, dataset or build_labeled_splits(config.data), transform, out, started)

    def sources(self, *, blocks: int) -> Iterator[FeatureSource]:
        """The model's features with [CLS] of some last blocks; with baselines then its random-init model's, and raw pixels.

        What is stored already is taken, all else stored. The float16 features are mapped from files: take what you
        need, then its `.float()`, and never write into them.

        Raises:
            UserError: The model's features have diverged or collapsed, or fewer than two classes can be read.
            RankFinished: Another process of this launch goes on to the evaluation.
        """
        assert isinstance(self.config, EvaluationConfig)  # fine-tuning has no frozen features
        if torchrun_rank()[0]:
            for _, describe in self._describers(blocks):
                stored(describe, self.dataset, config=self.config, run=self.loaded.run)
            raise RankFinished
        for name, describe in self._describers(blocks):
            sets = stored(describe, self.dataset, config=self.config, run=self.loaded.run)
            stores = [found.cache for found in sets]
            train, *rest = (store.features(blocks=min(blocks, describe.blocks)) for store in stores)
            test = rest[0] if rest else None
            if name == MODEL:
                self._list_skipped(stores)
                self._check(train, test)
            if name == PIXELS:
                mean = mean_cls(train)
                train, test = center_cls(train, mean), None if test is None else center_cls(test, mean)
            yield FeatureSource(name, train, test)

    def finish(
        self,
        scores: Sequence[ModelScores],
        *,
        protocol: dict[str, Any],
        train_labels: Tensor,
        test_labels: Tensor,
        findings: dict[str, Any],
        warnings: Sequence[str],
        title: str = "",
        engines: dict[str, str] | None = None,
        selection: dict[str, Any] | None = None,
        seeds: Mapping[str, int | list[int]] | None = None,
        main_metrics: Sequence[str] = (),
        by_class: str | None = None,
        figure: bool = False,
    ) -> EvalResult:
        """Write the record to `out`.

        Args:
            scores: The model's, then those of the baselines.
            title: The task in words; by default its name.
            protocol: All that decides over the numbers, but model, images and transform.
            train_labels: Of the images that were learned from.
            test_labels: Of those that were tested on.
            findings: What else was found out about the images.
            warnings: What a reader of the numbers must know.
            engines: Which of several ways to the same numbers was taken, by what for.
            selection: What was chosen (`chosen`), and by which images (`on`); None: nothing was.
            seeds: Beside those of the pretraining and of the evaluation.
            main_metrics: Names of those that a summary shows; by default all but details.
            by_class: What follows "top-1" in the metric whose mistakes are told class by class.
            figure: Also draw them, as a PNG beside the record.
        """
        confusion = self._confusion(scores[0], by_class)
        drawing = sibling_path(self.out, ".png")
        record = EvalResult(
            task=self.task,
            title=title or self.task,
            main_metrics=list(main_metrics),
            protocol={**protocol, "transform": self._resizing()},
            model=ModelInfo(**provenance.model_metadata(self.loaded, self.config.checkpoint, self.config.weights)),
            data=DataInfo(**{**self._data(train_labels, test_labels), **findings}),
            seeds={**self._seeds(), **(seeds or {})},
            score=scores[0],
            baselines=list(scores[1:]),
            cost=provenance.runtime_cost(self.started, best_device()),
            environment={**provenance.environment(best_device()), **(engines or {})},
            warnings=[*self._skip_warnings(), *_classes_apart(train_labels, test_labels), *warnings],
            selection=Selection(**selection) if selection else None,
            config=self.config.model_dump(mode="json", exclude={"out"}),
            by_class=confusion and {**confusion.to_dict(), "figure": drawing.name if figure else None},
        )
        archive_previous_result(self.out, record)
        record.write(self.out)
        drawing.unlink(missing_ok=True)
        if confusion and by_class is not None and figure:
            heading = f"{record.model.name}: {self.task}, {confusion.metric}, on {record.data.name}"
            plot_confusion(
                drawing, confusion, read_hardest_images(scores[0].predictions[by_class], self._asked()), heading
            )
        return record

    def _confusion(self, score: ModelScores, suffix: str | None) -> ConfusionSummary | None:
        """Return the confusions of the metric with this suffix."""
        if suffix is None:
            return None
        predictions = score.predictions[suffix]
        return ConfusionSummary(f"top-1{suffix}", self._asked().classes, predictions.target, predictions.predicted)

    def _resizing(self) -> dict[str, Any]:
        """Describe the transform without the normalization, which belongs to the model."""
        return {key: value for key, value in self.transform.describe().items() if key not in ("mean", "std")}

    def _seeds(self) -> dict[str, int | None]:
        return {"pretrain": provenance.pretraining_seed(self.loaded.run), "evaluation": self.config.seed}

    def _data(self, train_labels: Tensor, test_labels: Tensor) -> dict[str, Any]:
        """What a record says of the images; their folders as they were named."""
        given = self.config.data
        return {
            "name": data_name(given),
            "root": str(given.root or given.train),
            **({} if given.test is None else {"test": str(given.test)}),
            "n_train": len(train_labels),
            "n_test": len(test_labels),
            "n_classes": len(torch.unique(torch.cat([train_labels, test_labels]))),
            "fingerprints": [part.fingerprint(sizes=True) for part in self.dataset if part is not None],
            "skipped": sum(part.count() for part in self._skipped()),
        }

    def _asked(self) -> ImageDataset:
        """The images that answers are of."""
        return self.dataset.train if self.dataset.test is None else self.dataset.test

    def _describers(self, blocks: int) -> Iterator[tuple[str, FeatureExtractor]]:
        """What says something of the images, made when it is its turn."""
        assert isinstance(self.config, EvaluationConfig)
        network = on_best_device(self.loaded)
        blocks = max(blocks, min(BLOCKS, network.backbone.num_blocks))
        yield MODEL, BackboneExtractor(network, self.transform, blocks=blocks)
        if self.config.baselines:
            twin = on_best_device(random_init_like(self.loaded, self.config.seed))
            yield RANDOM, BackboneExtractor(twin, self.transform, blocks=blocks)
            yield PIXELS, RawPixelExtractor(self.transform, channels=self.loaded.backbone.config.in_chans)

    def _list_skipped(self, stores: Sequence[FeatureCache]) -> None:
        """List the images that cannot be read beside the record, whether they were found now or long ago."""
        for part in self._skipped():
            part.path.unlink(missing_ok=True)
        for part, store in zip(self._skipped(), stores, strict=False):
            for broken in store.broken():
                part.record(broken)

    def _check(self, train: Features, test: Features | None) -> None:
        """Refuse features and labels that no evaluation can say anything of."""
        validate_features(train, self.loaded.source)
        if test is not None:
            validate_features(test, self.loaded.source)
        if len(torch.unique(train.labels)) < 2:
            raise UserError(
                f"{data_name(self.config.data)}: all images that can be read are of one class; two are needed"
            )

    def _skipped(self) -> tuple[SkippedImageLog, SkippedImageLog]:
        """The lists of the images that could not be read, beside the record."""
        train, test = (self.out.with_name(f"{self.out.stem}-skipped-{part}.txt") for part in ("train", "test"))
        return SkippedImageLog(train), SkippedImageLog(test)

    def _skip_warnings(self) -> list[str]:
        return [
            f"{count:,} images could not be read: {part.path}" for part in self._skipped() if (count := part.count())
        ]


def load_model(config: LabeledEvalConfig | FeatureCommandConfig) -> tuple[LoadedBackbone, EvalTransform]:
    """The model, and what images go through before it.

    Raises:
        UserError: There is none, or the size of the images does not fit it.
    """
    set_local_device()
    loaded = load_backbone(config.checkpoint, config.weights)
    image_size = config.data.image_size or loaded.backbone.config.img_size
    check_size(image_size, loaded.backbone.patch_size)
    return loaded, EvalTransform(image_size, config.data.crop_ratio, loaded.mean, loaded.std)


def stored(
    describe: FeatureExtractor,
    dataset: TrainTestSplit,
    *,
    config: EvaluationConfig | FeatureCommandConfig,
    run: Path | None,
) -> list[FillResult]:
    """What is said of the images to learn from, and of those to test on if there are such: stored now or before."""
    folder, name = features_folder(config.features, run), data_name(config.data)
    return [
        fill_cache(
            candidate_caches(describe, some, folder=folder, name=f"{name}-{part}"),
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
        )
        for part, some in zip(TrainTestSplit._fields, dataset, strict=True)
        if some is not None
    ]


def _classes_apart(train_labels: Tensor, test_labels: Tensor) -> list[str]:
    """Warnings of classes that stand on one side only."""
    known = torch.unique(train_labels)
    strangers = int((~torch.isin(test_labels, known)).sum())
    untested = int((~torch.isin(known, test_labels)).sum())
    texts = []
    if strangers:
        texts.append(f"{strangers:,} test images are of classes without training images: they count as wrong")
    if untested:
        texts.append(f"{untested:,} of {len(known):,} classes have no test images: nothing is said of them")
    return texts
