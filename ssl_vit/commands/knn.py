"""`ssl-vit knn`: exact kNN accuracy of the frozen features.

ssl-vit knn checkpoint=runs/photos data.root=labeled
ssl-vit knn checkpoint=timm:vit_small_patch16_224.dino data.train=labeled/train data.test=labeled/val
ssl-vit knn checkpoint=runs/photos eval_data=cifar10 data.root=data 'k=[20]' 'temperature=[0.07,0.1]'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ssl_vit.commands.log_results import draw_confusion, report_result
from ssl_vit.config.evaluate import KNNConfig
from ssl_vit.data.dataset_factory import TrainTestSplit
from ssl_vit.evaluation.classification.knn import (
    KNNResult,
    LabeledFeatures,
    NeighborResult,
    classify,
    search,
    train_test_overlap,
)
from ssl_vit.evaluation.classification.nearest_neighbors import choose_engine
from ssl_vit.evaluation.evaluator import MODEL, Evaluation, FeatureSource
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores, Predictions, topk_metrics
from ssl_vit.runtime.device import best_device

DEFAULT_K = 20  # mostly the best k (DINO), so its metric is the main one


class Settings(NamedTuple):
    """All k, in the order of the table, and all temperatures."""

    ks: list[int]
    temperatures: list[float]

    def suffix(self, k: int, temperature: float) -> str:
        """Return the part of a metric's name after "top-1"; the temperature only if there are several."""
        return f", k={k}" + (f", T={temperature:g}" if len(self.temperatures) > 1 else "")

    @property
    def main(self) -> str:
        """The suffix of the main metric."""
        return self.suffix(DEFAULT_K if DEFAULT_K in self.ks else self.ks[0], self.temperatures[0])


def main(config: KNNConfig) -> None:
    """Run the command."""
    report_result(*evaluate(config), config)


def evaluate(config: KNNConfig, dataset: TrainTestSplit | None = None) -> tuple[EvalResult, Path]:
    """Evaluate, write the result, and return it with its file.

    Raises:
        UserError: Model or labeled images are missing, do not fit each other, or allow no evaluation.
    """
    evaluation = Evaluation.start("knn", config, dataset)
    device = best_device()
    ks, temperatures = sorted(set(config.k)), sorted(set(config.temperature))
    scores = []
    for source in evaluation.feature_sources(blocks=1):
        train = _labeled(source.train, device)
        queries = None if source.test is None else _labeled(source.test, device)
        found = search(train, queries, max_k=ks[-1], engine=config.engine)
        smallest = found.smallest_class()
        added = [smallest] if 0 < smallest < ks[0] else []
        settings = Settings([*added, *ks], temperatures)
        results = [classify(found, ks=settings.ks, temperature=temperature) for temperature in temperatures]
        scores.append(to_scores(source, results, settings))
        if source.name == MODEL:
            data_info, overlap = train_test_overlap(source, found, evaluation.dataset)
            warnings = [*results[0].warnings, *_notes(scores[0], added, found), *overlap]
    result = evaluation.write_result(
        scores,
        title="Nearest neighbors (kNN)",
        main_metrics=[f"top-1{settings.main}"],
        protocol={
            "features": "[CLS] of the last block after the final norm",
            "similarity": "cosine",
            "k": ks,
            "temperature": temperatures,
            "split": "leave-one-out" if queries is None else "train and test",
        },
        train_labels=train.labels,
        test_labels=train.labels if queries is None else queries.labels,
        data_info=data_info,
        engines={"knn": choose_engine(config.engine, device)},
        confusion_of=settings.main,
        figure=config.figure,
        warnings=warnings,
    )
    draw_confusion(result, evaluation)
    return result, evaluation.out


def to_scores(source: FeatureSource, results: Sequence[KNNResult], settings: Settings) -> ModelScores:
    """Return the metrics of one source, all top-1 first, from the results of each temperature."""
    queries = source.train if source.test is None else source.test
    classes = len(torch.unique(torch.cat([source.train.labels, queries.labels])))
    predictions = {
        settings.suffix(k, temperature): Predictions(
            queries.index, queries.labels, result.predicted[k].cpu(), result.ranks[k].cpu()
        )
        for temperature, result in zip(settings.temperatures, results, strict=True)
        for k in settings.ks
    }
    by_setting = [topk_metrics(each.rank, classes, suffix) for suffix, each in predictions.items()]
    metrics = [metric for depth in zip(*by_setting, strict=True) for metric in depth]
    details = {"k_effective": results[0].k_effective}
    return ModelScores(name=source.name, metrics=metrics, details=details, predictions=predictions)


def _labeled(features: Features, device: torch.device) -> LabeledFeatures:
    return LabeledFeatures(features.cls[:, -1].to(device), features.labels.to(device))


def _notes(score: ModelScores, added: Sequence[int], found: NeighborResult) -> list[str]:
    size = f"the size of the smallest class{' without the image itself' if found.leave_one_out else ''}"
    texts = [f"k = {k} was added, {size}" for k in added]
    if not any(metric.name.startswith("top-5") for metric in score.metrics):
        texts.append("top-5 is skipped: it needs six classes")
    return texts
