"""`ssl-vit demo`: the whole product on images that it makes itself, in a few minutes.

ssl-vit demo
ssl-vit demo method=sit run.name=demo-sit
"""

from __future__ import annotations

import shutil
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
from ssl_vit.training.run_dir import lock_run_dir, prepare_run_dir


def main(config: DemoConfig) -> None:
    """Run the command."""
    start = time.perf_counter()
    folder = config.run.path
    dataset = folder / "images"

    if not config.run.resume:
        with lock_run_dir(config.run):
            if config.run.overwrite:
                shutil.rmtree(folder, ignore_errors=True)
            prepare_run_dir(config.run)
            print(f"Making {config.num_images:,} sample images of 12 classes in {dataset}", flush=True)
            make_synthetic_dataset(dataset, dataset=config.num_images, seed=config.seed)
    pretrain(load_config("pretrain", pretrain_overrides(config, dataset), PretrainConfig))
    found = find_latest_checkpoint(folder / "checkpoints")
    if not found or found.step < config.max_steps:  # Ctrl-C
        return

    labeled = [f"checkpoint={folder}", f"data.train={dataset / 'train'}", f"data.test={dataset / 'test'}"]
    neighbors, _ = knn.measure(load_config("knn", [*labeled, "k=[20]"], KNNConfig))
    probe, _ = linear.measure(load_config("linear", labeled, LinearConfig))
    seen = attention.run_attention(
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
    print(f"\n{table(neighbors, probe, seen.results)}\n")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all. Open {page.path} in a browser")


def pretrain_overrides(config: DemoConfig, dataset: Path) -> list[str]:
    """The `pretrain` command that the demo runs; the labels serve the kNN along the way, never the training."""
    return [
        f"recipe=demo_{config.method}",
        f"data.root={dataset / 'train'}",
        f"seed={config.seed}",
        f"run.name={config.run.name}",
        f"run.folder={config.run.folder}",
        f"run.resume={config.run.resume}",
        f"trainer.max_steps={config.max_steps}",
    ]


def table(neighbors: EvalResult, probe: EvalResult, attention: list[MethodResult]) -> str:
    """What the model learned, beside the same model before training and beside no model at all."""
    rows = [("", "trained", "random", "no model")]
    for name, record in (("kNN accuracy, k = 20", neighbors), ("linear probe accuracy", probe)):
        own, untrained, pixels = (score.metrics[0].value for score in (record.score, *record.baselines))
        rows.append((name, f"{own:.3f}", f"{untrained:.3f}", f"{pixels:.3f} raw pixels"))
    iou = {result.name: {rule: float(values.mean()) for rule, values in result.ious.items()} for result in attention}
    trained, random = iou[MODEL], iou[RANDOM]
    prior = f"{iou['center prior']['IoU']:.3f} center prior"
    for name, rule in (
        ("attention IoU, area of the object", "area/mean"),
        ("attention IoU, 60 % of the mass", "mass/mean"),
        ("TokenCut masks, IoU", "tokencut"),
    ):
        rows.append((name, f"{trained[rule]:.3f}", f"{random[rule]:.3f}", prior))
    return "\n".join(f"{name:<36}{first:>9}{second:>9}   {third}" for name, first, second, third in rows)
