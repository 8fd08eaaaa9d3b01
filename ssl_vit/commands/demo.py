"""`ssl-vit demo`: pretrain, evaluate and report on generated images, in a few minutes.

ssl-vit demo
ssl-vit demo method=sit run.name=demo-sit
"""

from __future__ import annotations

import time
from pathlib import Path

from ssl_vit.commands import attention, knn, linear, report
from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.evaluate import KNNConfig, LinearConfig
from ssl_vit.config.pretrain import DemoConfig, PretrainConfig
from ssl_vit.config.visualize import AttentionConfig, ReportConfig
from ssl_vit.data.sources.synthetic import make_synthetic_dataset
from ssl_vit.evaluation.results.eval_result import EvalResult
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL, RANDOM, MethodResult
from ssl_vit.training.checkpointing import find_latest_checkpoint
from ssl_vit.training.run_dir import delete_run, lock_run_dir, prepare_run_dir
from ssl_vit.training.run_identity import mark_as_run


def main(config: DemoConfig) -> None:
    """Run the command."""
    start = time.perf_counter()
    folder = config.run.path
    dataset = folder / "dataset"  # `images` holds those that the run logs
    pretrain_config = load_config("pretrain", pretrain_overrides(config, dataset), PretrainConfig)

    if not config.run.resume:
        with lock_run_dir(config.run):
            if config.run.overwrite:
                delete_run(config.run)
            prepare_run_dir(config.run)
            folder.mkdir(exist_ok=True)
            mark_as_run(folder)
            print(f"Generating {config.num_images:,} images of 12 classes in {dataset}", flush=True)
            make_synthetic_dataset(dataset, num_images=config.num_images, seed=config.seed)
    pretrain(pretrain_config)
    latest = find_latest_checkpoint(folder / "checkpoints")
    if not latest or latest.step < config.max_steps:  # stopped by Ctrl-C
        return

    labeled = [f"checkpoint={folder}", f"data.train={dataset / 'train'}", f"data.test={dataset / 'test'}"]
    knn_result, _ = knn.evaluate(load_config("knn", [*labeled, "k=[20]"], KNNConfig))
    linear_result, _ = linear.evaluate(load_config("linear", labeled, LinearConfig))
    segmentation = attention.run_attention(
        load_config(
            "attention",
            [
                f"checkpoint={folder}",
                f"images={dataset / 'test'}",
                f"masks={dataset / 'test_masks'}",
                f"out={folder / 'attention'}",
                "methods=[attention,tokencut]",
            ],
            AttentionConfig,
        )
    )
    page = report.write(load_config("report", [f"run={folder}"], ReportConfig))
    print(f"\n{table(knn_result, linear_result, segmentation.results)}\n")
    print(f"Finished in {(time.perf_counter() - start) / 60:.1f} minutes. Open {page.path} in a browser.")


def pretrain_overrides(config: DemoConfig, dataset: Path) -> list[str]:
    """Return the overrides of the demo's `pretrain` run, which uses the labels for the online kNN only."""
    return [
        f"recipe=demo_{config.method}",
        f"data.root={dataset / 'train'}",
        f"seed={config.seed}",
        f"run.name={config.run.name}",
        f"run.folder={config.run.folder}",
        f"run.resume={config.run.resume}",
        f"trainer.max_steps={config.max_steps}",
    ]


def table(knn_result: EvalResult, linear_result: EvalResult, segmentation: list[MethodResult]) -> str:
    """Return the scores of the trained model beside random weights and a baseline without a model."""
    rows = [("", "trained", "random", "no model")]
    for name, result in (("kNN accuracy, k = 20", knn_result), ("linear probe accuracy", linear_result)):
        model, random_init, pixels = (score.metrics[0].value for score in (result.score, *result.baselines))
        rows.append((name, f"{model:.3f}", f"{random_init:.3f}", f"{pixels:.3f} raw pixels"))
    iou = {result.name: {rule: float(values.mean()) for rule, values in result.ious.items()} for result in segmentation}
    trained, random = iou[MODEL], iou[RANDOM]
    prior = f"{iou['center prior']['IoU']:.3f} center prior"
    for name, rule in (
        ("attention IoU, area of the foreground", "area/mean"),
        ("attention IoU, 60 % attention mass", "mass/mean"),
        ("TokenCut masks, IoU", "tokencut"),
    ):
        rows.append((name, f"{trained[rule]:.3f}", f"{random[rule]:.3f}", prior))
    return "\n".join(f"{name:<36}{first:>9}{second:>9}   {third}" for name, first, second, third in rows)
