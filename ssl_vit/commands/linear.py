"""`ssl-vit linear`: what the frozen features are worth, by a linear probe chosen on held-out training pictures.

ssl-vit linear checkpoint=runs/photos data.root=labelled
ssl-vit linear checkpoint=timm:vit_small_patch16_224.dino data.train=labelled/train data.test=labelled/val
ssl-vit linear checkpoint=runs/photos labelled=cifar10 data.root=data 'blocks=[1]'
ssl-vit linear checkpoint=runs/photos data.root=labelled protocol=dino
"""

from __future__ import annotations

from pathlib import Path

import torch

from ssl_vit.config_evaluation import LinearConfig
from ssl_vit.errors import UserError
from ssl_vit.evaluation.features import Features
from ssl_vit.evaluation.linear import LinearResult, Variant, linear_probe, stratified
from ssl_vit.evaluation.records import Answers, Record, Score, accuracies
from ssl_vit.evaluation.study import PIXELS, Source, Study
from ssl_vit.training.hardware import best_device
from ssl_vit.training.published import published_probe

TEST_SHARE = 0.2  # of each class, where there is but one set of pictures


def main(config: LinearConfig) -> None:
    """Run the command."""
    record, path = measure(config)
    print(f"{record.table()}\n\n{path}")


def measure(config: LinearConfig) -> tuple[Record, Path]:
    """The record of the evaluation, and the file that it was written to.

    Raises:
        UserError: Network and labelled pictures are not there, do not fit, or allow no evaluation.
    """
    if config.protocol != "held-out":
        return published_probe(config)
    study = Study.begin("linear", config)
    depth = len(study.loaded.backbone.vit.blocks)
    blocks = sorted({min(count, depth) for count in config.blocks})
    variants = [Variant(count, patch_mean) for count in blocks for patch_mean in (False, True)]
    results, scores = [], []
    for source in study.sources(blocks=max(blocks)):
        train, test = _split(source, config.seed)
        result = linear_probe(
            train,
            test,
            variants=[Variant(1, False)] if source.name == PIXELS else variants,
            l2=config.l2,
            held_out=config.held_out,
            seed=config.seed,
            device=best_device(),
        )
        results.append(result)
        scores.append(_score(source.name, result, train, test))
    record = study.finish(
        scores,
        protocol={
            "features": [str(variant) for variant in variants],
            "standardised": "by the training pictures",
            "objective": "mean cross-entropy + l2 / 2 |W|^2, bias free",
            "l2": sorted(set(config.l2)),
            "selection": f"{config.held_out:g} of the training pictures of each class, refit on all, tested once",
            "split": "train and test" if source.test is not None else f"{TEST_SHARE:g} of each class held out to test",
            "seed": config.seed,
        },
        train_labels=train.labels,
        test_labels=test.labels,
        findings={},
        warnings=results[0].warnings,
    )
    return record, study.out


def _split(source: Source, seed: int) -> tuple[Features, Features]:
    """The two sets that there are, or a part of each class of the only one held out to test on."""
    if source.test is not None:
        return source.train, source.test
    test = stratified(source.train.labels, TEST_SHARE, seed=seed)
    if not test.any():
        raise UserError("no class has two pictures: none can be held out to test on")
    return source.train.take(~test), source.train.take(test)


def _score(name: str, result: LinearResult, train: Features, test: Features) -> Score:
    classes = len(torch.unique(torch.cat([train.labels, test.labels])))
    chosen = {"features": str(result.chosen.variant), "l2": result.chosen.l2}
    trials = [
        {"features": str(trial.variant), "l2": trial.l2, "accuracy": trial.accuracy, "loss": trial.loss}
        for trial in result.trials
    ]
    answers = Answers(test.index, test.labels, result.predicted, result.ranks)
    details = {"chosen": chosen, "held_out": trials}
    return Score(name, accuracies(result.ranks, classes), details, {"": answers})
