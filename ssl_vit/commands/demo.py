"""`ssl-vit demo`: the whole product on pictures that it makes itself, in a few minutes.

ssl-vit demo
ssl-vit demo method=sit run.name=demo-sit
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from ssl_vit.attention.summary import NETWORK, RANDOM, Result
from ssl_vit.commands import attention, knn, linear, report
from ssl_vit.commands.compose import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config import DemoConfig, PretrainConfig
from ssl_vit.config_evaluation import KNNConfig, LinearConfig
from ssl_vit.config_pictures import AttentionConfig, ReportConfig
from ssl_vit.data.sample import make_sample
from ssl_vit.records.record import Record
from ssl_vit.training.checkpoints import newest
from ssl_vit.training.runs import claim_folder, locked


def main(config: DemoConfig) -> None:
    """Run the command."""
    start = time.perf_counter()
    folder = config.run.path
    pictures = folder / "pictures"

    if not config.run.resume:
        with locked(config.run):
            if config.run.overwrite:
                shutil.rmtree(folder, ignore_errors=True)
            claim_folder(config.run)
            print(f"Making {config.pictures:,} sample pictures of 12 classes in {pictures}", flush=True)
            make_sample(pictures, pictures=config.pictures, seed=config.seed)
    pretrain(load_config("pretrain", pretrain_words(config, pictures), PretrainConfig))
    found = newest(folder / "checkpoints")
    if not found or found.step < config.max_steps:  # Ctrl-C
        return

    labelled = [f"checkpoint={folder}", f"data.train={pictures / 'train'}", f"data.test={pictures / 'test'}"]
    neighbours, _ = knn.measure(load_config("knn", [*labelled, "k=[20]"], KNNConfig))
    probe, _ = linear.measure(load_config("linear", labelled, LinearConfig))
    seen = attention.segment(
        load_config(
            "attention",
            [
                f"checkpoint={folder}",
                f"images={pictures / 'test'}",
                f"masks={pictures / 'test_masks'}",
                f"out={folder / 'attention'}",
                "methods=[attention,tokencut]",
            ],
            AttentionConfig,
        )
    )
    page = report.write(load_config("report", [f"run={folder}"], ReportConfig))
    print(f"\n{table(neighbours, probe, seen.results)}\n")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all. Open {page.path} in a browser")


def pretrain_words(config: DemoConfig, pictures: Path) -> list[str]:
    """The `pretrain` command that the demo runs; the labels serve the kNN along the way, never the training."""
    return [
        f"recipe=demo_{config.method}",
        f"data.root={pictures / 'train'}",
        f"seed={config.seed}",
        f"run.name={config.run.name}",
        f"run.folder={config.run.folder}",
        f"run.resume={config.run.resume}",
        f"trainer.max_steps={config.max_steps}",
    ]


def table(neighbours: Record, probe: Record, attention: list[Result]) -> str:
    """What the network learned, beside the same network before training and beside no network at all."""
    rows = [("", "trained", "random", "no network")]
    for name, record in (("kNN accuracy, k = 20", neighbours), ("linear probe accuracy", probe)):
        own, untrained, pixels = (score.metrics[0].value for score in (record.score, *record.baselines))
        rows.append((name, f"{own:.3f}", f"{untrained:.3f}", f"{pixels:.3f} raw pixels"))
    iou = {result.name: {rule: float(values.mean()) for rule, values in result.ious.items()} for result in attention}
    trained, random = iou[NETWORK], iou[RANDOM]
    prior = f"{iou['centre prior']['IoU']:.3f} centre prior"
    for name, rule in (
        ("attention IoU, area of the object", "area/mean"),
        ("attention IoU, 60 % of the mass", "mass/mean"),
        ("TokenCut masks, IoU", "tokencut"),
    ):
        rows.append((name, f"{trained[rule]:.3f}", f"{random[rule]:.3f}", prior))
    return "\n".join(f"{name:<36}{first:>9}{second:>9}   {third}" for name, first, second, third in rows)
