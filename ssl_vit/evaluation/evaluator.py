"""Evaluation of a model on labeled images: feature sources, baselines, and the result."""

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
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.data.value_notes import value_notes
from ssl_vit.evaluation.features.cache import FeatureCache, candidate_caches, features_folder
from ssl_vit.evaluation.features.cache_writer import FillResult, fill_cache
from ssl_vit.evaluation.features.extractor import (
    BackboneExtractor,
    FeatureExtractor,
    Features,
    RawPixelExtractor,
    center_cls,
    check_size,
    mean_cls,
    on_best_device,
    validate_features,
)
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.comparison import changes_since_start
from ssl_vit.evaluation.results.confusion_matrix import ConfusionSummary
from ssl_vit.evaluation.results.eval_result import (
    DataInfo,
    EvalResult,
    ModelInfo,
    ModelScores,
    Selection,
    lock_result,
    sibling_path,
)
from ssl_vit.evaluation.results.provenance import data_inputs, data_name, pretraining_seed, result_path
from ssl_vit.evaluation.results.result_reader import archive_previous_result, is_result
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone, load_start_of_run, random_init_like
from ssl_vit.runtime.device import best_device, set_local_device
from ssl_vit.runtime.errors import RankFinished, UserError
from ssl_vit.runtime.launch import torchrun_rank
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.runtime.text import pluralize, truncate_list

BLOCKS = 4  # minimum number of last blocks in the feature cache, so that all evaluations share one pass
_SHOWN_CLASSES = 8  # names in a result's title
MODEL, START, RANDOM, PIXELS = "model", "start weights", "random init", "raw pixels"


class FeatureSource(NamedTuple):
    """Features of all readable images from the model or a baseline."""

    name: str
    train: Features
    test: Features | None  # None: there is only one dataset


@dataclass(frozen=True)
class Evaluation:
    """One evaluation from its start to its result."""

    task: str
    config: LabeledEvalConfig
    loaded: LoadedBackbone
    dataset: TrainTestSplit
    transform: EvalTransform
    out: Path
    started: float  # by `time.perf_counter`

    @classmethod
    def start(cls, task: str, config: LabeledEvalConfig, dataset: TrainTestSplit | None = None) -> Evaluation:
        """Load the model and find the images.

        Raises:
            UserError: One of them is missing, or they do not fit each other.
        """
        started = time.perf_counter()
        loaded, transform = load_model(config)
        out = config.out or result_path(task, config, loaded)
        files = [out, sibling_path(out, ".npz"), sibling_path(out, ".png")]
        for path in files:
            if path.exists() and not path.is_file():
                raise UserError(f"out={out}: {path} is not a file and cannot be replaced; use another name")
        if config.out is not None and not torchrun_rank()[0]:
            check_outputs(files, task, inputs=data_inputs(config.data), is_own=is_result(out))
        dataset = (dataset or build_labeled_splits(config.data)).with_range(config.data.range or loaded.value_range)
        return cls(task, config, loaded, dataset, transform, out, started)

    @property
    def test_images(self) -> ImageDataset:
        """The images that predictions refer to."""
        return self.dataset.train if self.dataset.test is None else self.dataset.test

    def feature_sources(self, *, blocks: int) -> Iterator[FeatureSource]:
        """Yield the features of the model with the [CLS] of the last blocks, then those of the baselines.

        Features are read from the cache, or extracted into it. They are float16, mapped from files: select what you
        need before `.float()`, and never write into them.

        Raises:
            UserError: The model's features have diverged or collapsed, or fewer than two classes are readable.
            RankFinished: This process is not rank 0, which alone continues with the evaluation.
        """
        assert isinstance(self.config, EvaluationConfig)  # fine-tuning has no frozen features
        rank = torchrun_rank()[0]
        for name, extractor in self._extractors(blocks):
            filled = fill_caches(extractor, self.dataset, config=self.config, run=self.loaded.run)
            if rank:
                continue
            caches = [result.cache for result in filled]
            train, *rest = (cache.features(blocks=min(blocks, extractor.blocks)) for cache in caches)
            test = rest[0] if rest else None
            if name == MODEL:
                self._list_skipped(caches)
                for part in (train, *([] if test is None else [test])):
                    validate_features(part, self.loaded.source)
                if len(torch.unique(train.labels)) < 2:
                    data = data_name(self.config.data)
                    raise UserError(f"{data}: all readable images are of one class; two are needed")
            if name == PIXELS:
                mean = mean_cls(train)
                train, test = center_cls(train, mean), None if test is None else center_cls(test, mean)
            yield FeatureSource(name, train, test)
        if rank:
            raise RankFinished

    def write_result(
        self,
        scores: list[ModelScores],  # of the model, then of the baselines
        *,
        protocol: dict[str, Any],  # everything that determines the numbers, except model, images and transform
        train_labels: Tensor,
        test_labels: Tensor,
        title: str = "",  # the task in words; by default its name
        data_info: Mapping[str, Any] | None = None,  # further information about the images
        warnings: Sequence[str] = (),  # what a reader of the numbers must know
        engines: Mapping[str, str] | None = None,  # implementations, where several give the same numbers
        selection: Mapping[str, Any] | None = None,  # what was selected (`chosen`), and on which images (`on`)
        seeds: Mapping[str, int | list[int]] | None = None,  # besides those of the pretraining and the evaluation
        main_metrics: Sequence[str] = (),  # names of those that a summary shows; by default all but details
        confusion_of: str | None = None,  # suffix after "top-1" of the metric that is reported class by class
        figure: bool = False,  # whether the caller draws the confusions, as a PNG beside the result
    ) -> EvalResult:
        """Write the result to `out`."""
        image = sibling_path(self.out, ".png")
        by_class = None
        if confusion_of is not None:
            predictions = scores[0].predictions[confusion_of]
            classes = self.test_images.classes
            confusion = ConfusionSummary(f"top-1{confusion_of}", classes, predictions.target, predictions.predicted)
            by_class = {**confusion.to_dict(), "figure": image.name if figure else None}
        # The normalization belongs to the model.
        transform = {key: value for key, value in self.transform.describe().items() if key not in ("mean", "std")}
        if not self.test_images.value_range.is_auto:
            transform["value_range"] = str(self.test_images.value_range)
        result = EvalResult(
            task=self.task,
            title=title or self.task,
            main_metrics=list(main_metrics),
            protocol={**protocol, "transform": transform},
            model=ModelInfo(**provenance.model_metadata(self.loaded, self.config.checkpoint, self.config.weights)),
            data=self._data(train_labels, test_labels, data_info or {}),
            seeds={"pretrain": pretraining_seed(self.loaded.run), "evaluation": self.config.seed, **(seeds or {})},
            score=scores[0],
            baselines=scores[1:],
            changes=changes_since_start(scores, start=START),
            cost=provenance.runtime_cost(self.started, best_device()),
            environment={**provenance.environment(best_device()), **(engines or {})},
            warnings=[
                *self._skip_warnings(),
                *_class_warnings(train_labels, test_labels),
                *self._pretraining_warnings(),
                *value_notes(self.test_images),
                *warnings,
            ],
            selection=Selection(**selection) if selection else None,
            config=self.config.model_dump(mode="json", exclude={"out"}),
            by_class=by_class,
        )
        with lock_result(self.out):
            archive_previous_result(self.out, result)
            if self.config.out is not None:
                record_outputs([self.out, sibling_path(self.out, ".npz"), image], self.task)
            result.write(self.out)
            image.unlink(missing_ok=True)  # of an earlier result
        return result

    def _data(self, train_labels: Tensor, test_labels: Tensor, data_info: Mapping[str, Any]) -> DataInfo:
        """Return information about the images, with the folders as in the config."""
        data = self.config.data
        info = {
            "name": data_name(data),
            "root": str(data.root or data.train),
            **({} if data.test is None else {"test": str(data.test)}),
            "train_images": self.dataset.train.describe(),
            "test_images": None if self.dataset.test is None else self.dataset.test.describe(),
            "classes": truncate_list(self.dataset.train.classes, _SHOWN_CLASSES),
            "n_train": len(train_labels),
            "n_test": len(test_labels),
            "n_classes": len(torch.unique(torch.cat([train_labels, test_labels]))),
            "fingerprints": [part.fingerprint(sizes=True) for part in self.dataset if part is not None],
            "skipped": sum(part.count() for part in self._skipped()),
        }
        return DataInfo(**{**info, **data_info})

    def _extractors(self, blocks: int) -> Iterator[tuple[str, FeatureExtractor]]:
        """Yield the feature extractors of the model and the baselines, created one at a time."""
        assert isinstance(self.config, EvaluationConfig)
        loaded = on_best_device(self.loaded)
        blocks = max(blocks, min(BLOCKS, loaded.backbone.num_blocks))
        yield MODEL, BackboneExtractor(loaded, self.transform, blocks=blocks)
        if self.config.baselines:
            if start := load_start_of_run(self.loaded):
                yield START, BackboneExtractor(on_best_device(start), self.transform, blocks=blocks)
            random_init = on_best_device(random_init_like(self.loaded, self.config.seed))
            yield RANDOM, BackboneExtractor(random_init, self.transform, blocks=blocks)
            yield PIXELS, RawPixelExtractor(self.transform, channels=self.loaded.backbone.config.in_chans)

    def _list_skipped(self, caches: Sequence[FeatureCache]) -> None:
        """List the unreadable images beside the result, whether they were found now or earlier."""
        for log in self._skipped():
            log.path.unlink(missing_ok=True)
        for log, cache in zip(self._skipped(), caches, strict=False):
            for error in cache.broken():
                log.record(error)

    def _skipped(self) -> tuple[SkippedImageLog, SkippedImageLog]:
        """Return the lists of the unreadable train and test images, beside the result."""
        train, test = (self.out.with_name(f"{self.out.stem}-skipped-{part}.txt") for part in ("train", "test"))
        return SkippedImageLog(train), SkippedImageLog(test)

    def _pretraining_warnings(self) -> list[str]:
        """Return a warning if the run trained, without their labels, on the folder that the test images are in."""
        data = provenance.run_config(self.loaded.run).get("data")
        root = data.get("root") if isinstance(data, dict) else None
        test = self.test_images
        if not isinstance(root, str) or not isinstance(test, ImageFolder):
            return []
        if not test.root.resolve().is_relative_to(Path(root).resolve()):
            return []
        return [f"the run has trained, without labels, on all images in {root}, these test images included"]

    def _skip_warnings(self) -> list[str]:
        counts = {log.path: log.count() for log in self._skipped()}
        return [f"{pluralize(count, 'image')} could not be read: {path}" for path, count in counts.items() if count]


def load_model(config: LabeledEvalConfig | FeatureCommandConfig) -> tuple[LoadedBackbone, EvalTransform]:
    """Load the model and build the transform of its images.

    Raises:
        UserError: There is no such model, or the size of the images does not fit it.
    """
    set_local_device()
    loaded = load_backbone(config.checkpoint, config.weights)
    image_size = config.data.image_size or loaded.backbone.config.img_size
    check_size(image_size, loaded.backbone.patch_size)
    return loaded, EvalTransform(image_size, config.data.crop_ratio, loaded.mean, loaded.std)


def fill_caches(
    extractor: FeatureExtractor,
    split: TrainTestSplit,
    *,
    config: EvaluationConfig | FeatureCommandConfig,
    run: Path | None,
) -> list[FillResult]:
    """Return the filled feature caches of the train images, and of the test images if there are any."""
    folder, name = features_folder(config.features, run), data_name(config.data)
    return [
        fill_cache(
            candidate_caches(extractor, dataset, folder=folder, name=f"{name}-{part}"),
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
        )
        for part, dataset in zip(TrainTestSplit._fields, split, strict=True)
        if dataset is not None
    ]


def _class_warnings(train_labels: Tensor, test_labels: Tensor) -> list[str]:
    """Return warnings of classes that have only train or only test images."""
    classes = torch.unique(train_labels)
    unknown = int((~torch.isin(test_labels, classes)).sum())
    untested = int((~torch.isin(classes, test_labels)).sum())
    texts = []
    if unknown:
        texts.append(f"{pluralize(unknown, 'test image')} of classes without training images: they count as wrong")
    if untested:
        texts.append(f"{untested:,} of {len(classes):,} classes have no test images and are not evaluated")
    return texts
