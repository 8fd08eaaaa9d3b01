"""What `ssl-vit attention` measured and how, as files for later comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.attention.summary import NETWORK, Result
from ssl_vit.config_evaluation import AttentionConfig
from ssl_vit.models.weights import LoadedBackbone
from ssl_vit.records import provenance
from ssl_vit.records.record import Record, Score

PROTOCOL = {
    "map": "[CLS] row of the last block's softmax over all tokens in float32; patches only, scaled to sum 1",
    "resize": "each side to the nearest multiple of the patch, bicubic, antialias; no crop, no padding",
    "mask of a map": "the fewest patches that hold `mass` of it; each pixel takes its patch's value, original size",
    "object": "non-zero pixels of the given masks",
    "mass/...": "IoU of the masks",
    "area/...": "IoU of as many top patches as the object's area makes: the area is taken from the given mask",
    "fixed head": "the best on one random half of the pictures, scored on the other, both ways",
    "mean": "the mask of the heads' mean map",
    "oracle head": "the best head of each picture, by its given mask",
    "centre prior": "average of the other pictures' masks, 64 x 64; threshold best on these pictures, of .05 to .95",
    "patch ceiling": "each patch takes the majority of its pixels in the given mask",
    "interval": "95 %, normal, over pictures",
}


def write_record(
    config: AttentionConfig, network: LoadedBackbone, results: list[Result], *, data: dict[str, Any], started: float
) -> None:
    """Write `summary.json` into `config.out`: the scores, if any, and how maps, masks and scores came about.

    Args:
        config: Of the command.
        network: Whose attention it is.
        results: The network's first; empty without masks.
        data: Counts of the pictures, and their fingerprint.
        started: When the maps were begun, in seconds of `time.perf_counter`.
    """
    device = network.backbone.vit.patch_embed.proj.weight.device
    scores = [result.score() for result in results] or [Score(NETWORK, [], {})]
    left_out = {"skipped": "could not be used", "unscored": "have no usable mask"}
    Record(
        task="attention",
        protocol={**PROTOCOL, "mass": config.mass, "max_side": config.max_side},
        model=provenance.network(network, config.checkpoint, config.weights),
        data={
            "name": config.images.resolve().stem,
            **config.model_dump(mode="json", include={"images", "masks", "limit"}),
            **data,
        },
        seeds={"pretrain": provenance.pretraining_seed(network.run), "evaluation": config.seed},
        score=scores[0],
        baselines=scores[1:],
        cost=provenance.cost(started, device),
        environment={**provenance.environment(device), "forward": "float32"},
        warnings=[f"{data[key]} pictures {what}" for key, what in left_out.items() if data[key]],
    ).write(config.out / "summary.json")


def write_ious(path: Path, results: list[Result], names: list[str]) -> None:
    """The IoU of every scored picture by every rule, in the order of `pictures`: for paired comparisons of networks."""
    if results:
        ious: dict[str, Any] = {f"{r.name}/{rule}": values.numpy() for r in results for rule, values in r.ious.items()}
        np.savez_compressed(path, pictures=np.array(names), **ious)
