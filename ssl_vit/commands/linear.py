"""`ssl-vit linear`: accuracy of a linear probe on the frozen features, selected on held-out training images.

ssl-vit linear checkpoint=runs/photos data.root=labeled
ssl-vit linear checkpoint=timm:vit_small_patch16_224.dino data.train=labeled/train data.test=labeled/val
ssl-vit linear checkpoint=runs/photos eval_data=cifar10 data.root=data 'blocks=[1]'
ssl-vit linear checkpoint=runs/photos data.root=labeled solver=sgd sgd.epochs=30
ssl-vit linear checkpoint=runs/photos data.root=labeled protocol=dino
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ssl_vit.commands.log_results import draw_confusion, report_result
from ssl_vit.config.evaluate import LinearConfig
from ssl_vit.data.dataset_factory import TrainTestSplit
from ssl_vit.evaluation.classification.knn import overlap_warnings
from ssl_vit.evaluation.classification.linear_classifier import (
    TEST_SHARE,
    FeatureVariant,
    save_probe,
    split_rule,
    stratified,
)
from ssl_vit.evaluation.classification.linear_probe import SGD, LinearResult, Logistic, Ridge, Solver, linear_probe
from ssl_vit.evaluation.classification.sgd_classifiers import Schedule
from ssl_vit.evaluation.evaluator import MODEL, PIXELS, Evaluation, FeatureSource
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores, Predictions, topk_metrics
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.published_linear import published_probe


def main(config: LinearConfig) -> None:
    """Run the command."""
    report_result(*evaluate(config), config)


def evaluate(config: LinearConfig, dataset: TrainTestSplit | None = None) -> tuple[EvalResult, Path]:
    """Evaluate, write the result, and return it with its file.

    Raises:
        UserError: Model or labeled images are missing, do not fit each other, or allow no evaluation.
    """
    result, evaluation = published_probe(config) if config.protocol != "held-out" else _evaluate(config, dataset)
    draw_confusion(result, evaluation)
    return result, evaluation.out


def _evaluate(config: LinearConfig, dataset: TrainTestSplit | None) -> tuple[EvalResult, Evaluation]:
    task = "linear" if config.solver == "logistic" else f"linear-{config.solver}"
    evaluation = Evaluation.start(task, config, dataset)
    depth = evaluation.loaded.backbone.num_blocks
    blocks = sorted({min(count, depth) for count in config.blocks})
    variants = [FeatureVariant(count, patch_mean) for count in blocks for patch_mean in (False, True)]
    solver = _solver(config)
    results, scores = [], []
    for source in evaluation.feature_sources(blocks=max(blocks)):
        train, test = split_source(source, config.seed)
        candidates = [FeatureVariant(1, False)] if source.name == PIXELS else variants
        found = linear_probe(train, test, variants=candidates, solver=solver, device=best_device())
        results.append(found)
        scores.append(_to_scores(source.name, found, train, test))
        if source.name == MODEL:
            overlap = overlap_warnings(source, evaluation.dataset)
    protocol, selection = solver.describe()
    result = evaluation.write_result(
        scores,
        title="Linear classifier on frozen features",
        protocol={
            "features": [str(variant) for variant in variants],
            "standardized": "by the training images",
            **protocol,
            "selection": selection["on"],
            "split": split_rule(source.test, config.seed),
        },
        train_labels=train.labels,
        test_labels=test.labels,
        warnings=[*results[0].warnings, *overlap],
        selection={**selection, "chosen": scores[0].details["chosen"]},
        confusion_of="",
        figure=config.figure,
    )
    names, found = evaluation.dataset.train.classes, results[0]
    save_probe(evaluation, found.probe, found.chosen.variant, [names[label] for label in found.classes])
    return result, evaluation


def split_source(source: FeatureSource, seed: int) -> tuple[Features, Features]:
    """Return the train and test features; of a single dataset a fraction of each class is the test split."""
    if source.test is not None:
        return source.train, source.test
    test = stratified(source.train.labels, TEST_SHARE, seed=seed)
    if not test.any():
        raise UserError("no class has two images, so there is no test split; add images, or set data.test")
    return source.train.take(~test), source.train.take(test)


def _solver(config: LinearConfig) -> Solver:
    sgd = config.sgd
    solvers: dict[str, Solver] = {
        "logistic": Logistic(config.l2, config.val_fraction, config.seed),
        "ridge": Ridge(config.l2),
        "sgd": SGD(sgd.lr, sgd.weight_decay, Schedule(sgd.epochs, sgd.batch_size, config.seed), config.val_fraction),
    }
    return solvers[config.solver]


def _to_scores(name: str, result: LinearResult, train: Features, test: Features) -> ModelScores:
    classes = len(torch.unique(torch.cat([train.labels, test.labels])))
    chosen, *candidates = (
        {
            "features": str(each.variant),
            **each.settings,
            **({"diverged": True} if math.isinf(each.loss) else {"accuracy": each.accuracy, "loss": each.loss}),
        }
        for each in (result.chosen, *result.candidates)
    )
    predictions = Predictions(test.index, test.labels, result.predicted, result.ranks)
    metrics, details = topk_metrics(result.ranks, classes), {"chosen": chosen, "candidates": candidates}
    return ModelScores(name=name, metrics=metrics, details=details, predictions={"": predictions})
