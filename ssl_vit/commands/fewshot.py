"""`ssl-vit fewshot`: what the frozen features are worth where few images have labels.

ssl-vit fewshot checkpoint=runs/photos data.root=labeled
ssl-vit fewshot checkpoint=runs/photos labeled=cifar10 data.root=data 'shots=[1,5]' 'shares=[]'
"""

from __future__ import annotations

from pathlib import Path

from ssl_vit.commands.linear import split
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
from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, split_rule
from ssl_vit.evaluation.evaluator import MODEL, PIXELS, Evaluation
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores
from ssl_vit.runtime.device import best_device


def main(config: FewshotConfig) -> None:
    """Run the command."""
    report_result(*measure(config), config)


def measure(config: FewshotConfig) -> tuple[EvalResult, Path]:
    """The record of the evaluation, and the file that it was written to.

    Raises:
        UserError: Model and labeled images are not there, do not fit, or allow no evaluation.
    """
    study = Evaluation.begin("fewshot", config)
    variant = FeatureVariant(min(config.blocks, study.loaded.backbone.num_blocks), config.patch_mean)
    seeds = range(config.seed, config.seed + config.subsets)
    scores = []
    for source in study.sources(blocks=variant.blocks):
        train, test = split(source, config.seed)
        settings, warnings = few_shot_settings(train.labels, shots=config.shots, shares=config.shares)
        outcomes = few_shot(
            train,
            test,
            variant=FeatureVariant(1, False) if source.name == PIXELS else variant,
            settings=settings,
            seeds=seeds,
            l2=config.l2,
            device=best_device(),
        )
        scores.append(_score(source.name, outcomes))
        if source.name == MODEL:
            edges = edge_warnings(outcomes, config.l2)
            chosen = {outcome.setting: {"l2": outcome.l2} for outcome in outcomes if outcome.l2}
    ridge = [metric.name for metric in scores[0].metrics if metric.name.endswith(f", {RIDGE}")]
    record = study.finish(
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
            "subsets": f"{config.subsets} per setting, nested, drawn by label and place, seeds from {config.seed} on",
            "answers": "of the first subset",
            "split": split_rule(source.test, config.seed),
        },
        train_labels=train.labels,
        test_labels=test.labels,
        findings={"labeled": {setting.name: int(setting.counts.sum()) for setting in settings}},
        warnings=[*warnings, *edges],
        selection={"on": "leave-one-out within each subset", "chosen": chosen},
        seeds={"subsets": list(seeds)},
    )
    return record, study.out


def _score(name: str, outcomes: list[FewShotResult]) -> ModelScores:
    """The ridge probe in all settings, then the nearest neighbor."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.classifier != RIDGE)
    details = {
        "subsets": [
            {
                "setting": outcome.setting,
                "classifier": outcome.classifier,
                "accuracy": outcome.accuracy,
                "standard_deviation": outcome.deviation,
            }
            | ({"l2": outcome.l2} if outcome.l2 else {})
            for outcome in ordered
        ]
    }
    return ModelScores(
        name=name,
        metrics=[outcome.metric() for outcome in ordered],
        details=details,
        predictions={outcome.suffix: outcome.predictions for outcome in ordered},
    )
