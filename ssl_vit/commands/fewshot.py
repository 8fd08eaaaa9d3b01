"""`ssl-vit fewshot`: accuracy of the frozen features with few labeled images.

ssl-vit fewshot checkpoint=runs/photos data.root=labeled
ssl-vit fewshot checkpoint=runs/photos eval_data=cifar10 data.root=data 'shots=[1,5]' 'shares=[]'
"""

from __future__ import annotations

from pathlib import Path

from ssl_vit.commands.linear import split_source
from ssl_vit.commands.log_results import report_result
from ssl_vit.config.evaluate import FewshotConfig
from ssl_vit.evaluation.classification.few_shot import (
    NEAREST,
    RIDGE,
    FewShotResult,
    edge_warnings,
    few_shot,
    few_shot_settings,
)
from ssl_vit.evaluation.classification.knn import overlap_warnings
from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, split_rule
from ssl_vit.evaluation.evaluator import MODEL, PIXELS, Evaluation
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores
from ssl_vit.runtime.device import best_device


def main(config: FewshotConfig) -> None:
    """Run the command."""
    report_result(*evaluate(config), config)


def evaluate(config: FewshotConfig) -> tuple[EvalResult, Path]:
    """Evaluate, write the result, and return it with its file.

    Raises:
        UserError: Model or labeled images are missing, do not fit each other, or allow no evaluation.
    """
    evaluation = Evaluation.start("fewshot", config)
    variant = FeatureVariant(min(config.blocks, evaluation.loaded.backbone.num_blocks), config.patch_mean)
    seeds = range(config.seed, config.seed + config.subsets)
    scores = []
    for source in evaluation.feature_sources(blocks=variant.blocks):
        train, test = split_source(source, config.seed)
        settings, warnings = few_shot_settings(train.labels, shots=config.shots, shares=config.shares)
        results = few_shot(
            train,
            test,
            variant=FeatureVariant(1, False) if source.name == PIXELS else variant,
            settings=settings,
            seeds=seeds,
            l2=config.l2,
            device=best_device(),
        )
        scores.append(_to_scores(source.name, results))
        if source.name == MODEL:
            edges = edge_warnings(results, config.l2)
            overlap = overlap_warnings(source, evaluation.dataset)
            chosen = {result.setting: {"l2": result.l2} for result in results if result.l2}
    ridge = [metric.name for metric in scores[0].metrics if metric.name.endswith(f", {RIDGE}")]
    result = evaluation.write_result(
        scores,
        title="Few labels",
        main_metrics=[ridge[0], ridge[-1]],
        protocol={
            "classifiers": {
                RIDGE: f"{variant}, standardized by the subset; 1 / (2 N) squared error to +1 and -1 + l2 / 2 |W|^2",
                NEAREST: "cosine of the [CLS] of the last block",
            },
            "l2": sorted(set(config.l2)),
            "selection": "l2 by the squared error of exact leave-one-out within the subset",
            "shots": sorted(set(config.shots)),
            "shares": sorted(set(config.shares)),
            "subsets": f"{config.subsets} per setting, nested, drawn by label and index, seeds from {config.seed} on",
            "predictions": "of the first subset",
            "split": split_rule(source.test, config.seed),
        },
        train_labels=train.labels,
        test_labels=test.labels,
        data_info={"labeled": {setting.name: int(setting.counts.sum()) for setting in settings}},
        warnings=[*warnings, *edges, *overlap],
        selection={"on": "leave-one-out within each subset", "chosen": chosen},
        seeds={"subsets": list(seeds)},
    )
    return result, evaluation.out


def _to_scores(name: str, results: list[FewShotResult]) -> ModelScores:
    """Return the metrics of the ridge probe in all settings, then those of the nearest neighbor."""
    ordered = sorted(results, key=lambda result: result.classifier != RIDGE)
    subsets = [
        {
            "setting": result.setting,
            "classifier": result.classifier,
            "accuracy": result.accuracy,
            "standard_deviation": result.deviation,
        }
        | ({"l2": result.l2} if result.l2 else {})
        for result in ordered
    ]
    return ModelScores(
        name=name,
        metrics=[result.metric() for result in ordered],
        details={"subsets": subsets},
        predictions={result.suffix: result.predictions for result in ordered},
    )
