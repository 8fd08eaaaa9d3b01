"""`ssl-vit knn`: what the frozen features are worth, by exact kNN classification.

ssl-vit knn checkpoint=runs/photos data.root=labelled
ssl-vit knn checkpoint=timm:vit_small_patch16_224.dino data.train=labelled/train data.test=labelled/val
ssl-vit knn checkpoint=runs/photos labelled=cifar10 data.root=data 'k=[20]'
"""

from __future__ import annotations

from pathlib import Path

import torch

from ssl_vit.commands.publish import publish
from ssl_vit.config_evaluation import KNNConfig
from ssl_vit.evaluation.features import Features
from ssl_vit.evaluation.knn import NEAR_DUPLICATE, KNNResult, Labelled, knn
from ssl_vit.evaluation.records import Answers, Record, Score, accuracies
from ssl_vit.evaluation.search import choose_engine
from ssl_vit.evaluation.study import Source, Study
from ssl_vit.training.hardware import best_device

USUAL = 20  # k that is mostly best (DINO), so the one whose mistakes are told class by class


def main(config: KNNConfig) -> None:
    """Run the command."""
    publish(*measure(config), config)


def measure(config: KNNConfig) -> tuple[Record, Path]:
    """The record of the evaluation, and the file that it was written to.

    Raises:
        UserError: Network and labelled pictures are not there, do not fit, or allow no evaluation.
    """
    study = Study.begin("knn", config)
    device = best_device()
    results, scores = [], []
    for source in study.sources(blocks=1):
        bank = _labelled(source.train, device)
        queries = None if source.test is None else _labelled(source.test, device)
        result = knn(bank, queries, ks=config.k, temperature=config.temperature, engine=config.engine)
        results.append(result)
        scores.append(_score(source, result))
    near_duplicates = results[0].near_duplicates
    record = study.finish(
        scores,
        protocol={
            "features": "[CLS] of the last block after the final norm",
            "similarity": "cosine",
            "k": sorted(set(config.k)),
            "temperature": config.temperature,
            "split": "leave-one-out" if queries is None else "train and test",
        },
        train_labels=bank.labels,
        test_labels=bank.labels if queries is None else queries.labels,
        findings={"near_duplicates": near_duplicates},
        engines={"knn": choose_engine(config.engine, device)},
        by_class=f", k={USUAL if USUAL in config.k else min(config.k)}",
        sheet=config.sheet,
        warnings=[*results[0].warnings, *_leak(near_duplicates, one_set=queries is None)],
    )
    return record, study.out


def _labelled(features: Features, device: torch.device) -> Labelled:
    return Labelled(features.cls[:, -1].to(device), features.labels.to(device))


def _score(source: Source, result: KNNResult) -> Score:
    asked = source.train if source.test is None else source.test
    classes = len(torch.unique(torch.cat([source.train.labels, asked.labels])))
    by_k = [accuracies(ranks, classes, f", k={k}") for k, ranks in result.ranks.items()]
    metrics = [metric for same_depth in zip(*by_k, strict=True) for metric in same_depth]  # top-1 of all k first
    answers = {
        f", k={k}": Answers(asked.index, asked.labels, result.predicted[k].cpu(), ranks.cpu())
        for k, ranks in result.ranks.items()
    }
    return Score(source.name, metrics, {"k_effective": result.k_effective}, answers)


def _leak(near_duplicates: int, *, one_set: bool) -> list[str]:
    where = "another picture" if one_set else "a training picture"
    text = f"{near_duplicates:,} test pictures are nearly the same as {where} (cosine > {NEAR_DUPLICATE})"
    return [text] if near_duplicates else []
