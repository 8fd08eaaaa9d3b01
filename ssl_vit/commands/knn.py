"""`ssl-vit knn`: what the frozen features are worth, by exact kNN classification.

ssl-vit knn checkpoint=runs/photos data.root=labeled
ssl-vit knn checkpoint=timm:vit_small_patch16_224.dino data.train=labeled/train data.test=labeled/val
ssl-vit knn checkpoint=runs/photos labeled=cifar10 data.root=data 'k=[20]' 'temperature=[0.07,0.1]'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ssl_vit.commands.log_results import report_result
from ssl_vit.config.evaluate import KNNConfig
from ssl_vit.data.dataset_factory import TrainTestSplit
from ssl_vit.evaluation.classification.knn import KNNResult, LabeledFeatures, NeighborResult, classify, search
from ssl_vit.evaluation.classification.nearest_neighbors import choose_engine
from ssl_vit.evaluation.classification.train_test_overlap import find_overlap
from ssl_vit.evaluation.evaluator import MODEL, Evaluation, FeatureSource
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores, Predictions, topk_metrics
from ssl_vit.runtime.device import best_device

DEFAULT_K = 20  # k that is mostly best (DINO), so the one whose mistakes are told class by class


class Settings(NamedTuple):
    """All k, in the order of the table, and all temperatures."""

    ks: list[int]
    temperatures: list[float]

    def suffix(self, k: int, temperature: float) -> str:
        """What follows "top-1" in the name of a metric; the temperature where there are several."""
        return f", k={k}" + (f", T={temperature:g}" if len(self.temperatures) > 1 else "")


def main(config: KNNConfig) -> None:
    """Run the command."""
    report_result(*measure(config), config)


def measure(config: KNNConfig, dataset: TrainTestSplit | None = None) -> tuple[EvalResult, Path]:
    """The record of the evaluation, and the file that it was written to.

    Raises:
        UserError: Model and labeled images are not there, do not fit, or allow no evaluation.
    """
    study = Evaluation.begin("knn", config, dataset)
    device = best_device()
    asked, temperatures = sorted(set(config.k)), sorted(set(config.temperature))
    scores = []
    for source in study.sources(blocks=1):
        bank = _labeled(source.train, device)
        queries = None if source.test is None else _labeled(source.test, device)
        found = search(bank, queries, max_k=asked[-1], engine=config.engine)
        added = _fallback_k(asked, found.smallest_class())
        settings = Settings([*added, *asked], temperatures)
        results = [classify(found, ks=settings.ks, temperature=temperature) for temperature in temperatures]
        scores.append(to_scores(source, results, settings))
        if source.name == MODEL:
            leak = find_overlap(source, found, study.dataset)
            warnings = [*results[0].warnings, *_notes(scores[0], added, found), *leak.warnings()]
    main = settings.suffix(DEFAULT_K if DEFAULT_K in settings.ks else settings.ks[0], settings.temperatures[0])
    record = study.finish(
        scores,
        title="Nearest neighbors (kNN)",
        main_metrics=[f"top-1{main}"],
        protocol={
            "features": "[CLS] of the last block after the final norm",
            "similarity": "cosine",
            "k": asked,
            "temperature": temperatures,
            "split": "leave-one-out" if queries is None else "train and test",
        },
        train_labels=bank.labels,
        test_labels=bank.labels if queries is None else queries.labels,
        findings=leak.data_info(),
        engines={"knn": choose_engine(config.engine, device)},
        by_class=main,
        figure=config.figure,
        warnings=warnings,
    )
    return record, study.out


def _labeled(features: Features, device: torch.device) -> LabeledFeatures:
    return LabeledFeatures(features.cls[:, -1].to(device), features.labels.to(device))


def _fallback_k(asked: Sequence[int], smallest: int) -> list[int]:
    """The largest k for which no class is too small, where all that were asked for are larger."""
    return [smallest] if 0 < smallest < min(asked) else []


def _notes(score: ModelScores, added: Sequence[int], found: NeighborResult) -> list[str]:
    size = f"the size of the smallest class{' without the image itself' if found.leave_one_out else ''}"
    texts = [f"k = {k} was added, {size}" for k in added]
    if not any(metric.name.startswith("top-5") for metric in score.metrics):
        texts.append("top-5 is skipped: it needs six classes")
    return texts


def to_scores(source: FeatureSource, results: Sequence[KNNResult], settings: Settings) -> ModelScores:
    asked = source.train if source.test is None else source.test
    classes = len(torch.unique(torch.cat([source.train.labels, asked.labels])))
    answers = {
        settings.suffix(k, temperature): Predictions(
            asked.index, asked.labels, result.predicted[k].cpu(), result.ranks[k].cpu()
        )
        for temperature, result in zip(settings.temperatures, results, strict=True)
        for k in settings.ks
    }
    found = [topk_metrics(answer.rank, classes, suffix) for suffix, answer in answers.items()]
    metrics = [metric for same_depth in zip(*found, strict=True) for metric in same_depth]  # top-1 of all first
    details = {"k_effective": results[0].k_effective}
    return ModelScores(name=source.name, metrics=metrics, details=details, predictions=answers)
