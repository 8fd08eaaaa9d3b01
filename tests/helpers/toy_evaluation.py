"""Another evaluation, nearest class centroids: a function that scores, a config class and a command."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.commands.linear import split_source
from ssl_vit.commands.log_results import report_result
from ssl_vit.config.evaluate import EvaluationConfig
from ssl_vit.evaluation.classification.linear_classifier import label_ranks, split_rule
from ssl_vit.evaluation.evaluator import Evaluation
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores, Predictions, topk_metrics


class CentroidConfig(EvaluationConfig):
    normalize: bool


def centroid_scores(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Compute the negative distances (Q, C) of test features to the mean training features of each class."""
    centroids = torch.stack([train[labels == label].mean(dim=0) for label in torch.unique(labels)])
    return -torch.cdist(test, centroids)


def main(config: CentroidConfig) -> None:
    report_result(*evaluate(config), config)


def evaluate(config: CentroidConfig) -> tuple[EvalResult, Path]:
    evaluation = Evaluation.start("centroid", config)
    scores = []
    for source in evaluation.feature_sources(blocks=1):
        train, test = split_source(source, config.seed)
        features = [part.cls[:, -1].float() for part in (train, test)]
        if config.normalize:
            features = [F.normalize(part, dim=1) for part in features]
        classes, logits = torch.unique(train.labels), centroid_scores(features[0], train.labels, features[1])
        ranks = label_ranks(logits, classes, test.labels)
        predictions = Predictions(test.index, test.labels, classes[logits.argmax(dim=1)], ranks)
        metrics = topk_metrics(ranks, len(classes))
        scores.append(ModelScores(name=source.name, metrics=metrics, predictions={"": predictions}))
    result = evaluation.write_result(
        scores,
        title="Nearest class centroid",
        protocol={"normalize": config.normalize, "split": split_rule(source.test, config.seed)},
        train_labels=train.labels,
        test_labels=test.labels,
    )
    return result, evaluation.out
