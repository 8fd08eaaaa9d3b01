"""What `ssl-vit attention` measured and how, as files for later comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.config.visualize import AttentionConfig
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.eval_result import DataInfo, EvalResult, ModelInfo, ModelScores
from ssl_vit.evaluation.segmentation.segmentation_evaluator import BY_OBJECT, MEASURES, MODEL, MethodResult
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.atomic_io import atomic_write

MAIN_METRICS = ("mass/mean", "mass/fixed head", "tokencut")
CEILING = "patch ceiling"
HEADS = {"fixed head": "best fixed head", "mean": "heads’ mean", "oracle head": "each image’s best head"}
RULES = {
    "mass": "masks with {} of the attention",
    "area": "masks as large as the object (its size given)",
    "object": "masks of each object by itself",
}
PROTOCOL = {
    "map": "[CLS] row of the last block's softmax over all tokens in float32; patches only, scaled to sum 1",
    "resize": "each side to the nearest multiple of the patch, bicubic, antialias; no crop, no padding",
    "mask of a map": "the fewest patches that hold `mass` of it; each pixel takes its patch's value, original size",
    "object": "non-zero pixels of the given masks",
    "mass/...": "IoU of the masks",
    "area/...": "IoU of as many top patches as the object's area makes: the area is taken from the given mask",
    "fixed head": "the best by IoU on one random half of the images, scored on the other, both ways",
    "mean": "the mask of the heads' mean map",
    "oracle head": "the best head of each image, by the IoU with its given mask",
    "object/...": "IoU with each object's own mask, averaged over the objects, then over the images; oracle head: "
    "the best head of each object (Caron et al. 2021, dino#54); fixed head and mean: one map for all objects",
    "lost, tokencut, pca, found": "IoU of the method's mask of patches; pca's components are those of 50 of these "
    "images, its signs by their borders, without the given masks",
    "...+guided": "the mask (of attention: of the mean) through a guided filter with the image, at its size; it has "
    "no soft map: the maxF are those of the mask",
    "void": "left out of the intersection and the union, and of every other measure",
    "acc": "share of the pixels that the mask has right",
    "F@0.3": "F of the mask, beta² = 0.3, averaged over images: TokenCut's maxF without bilateral solver",
    "maxF@0.3": "soft map, bilinear at the image's size, brought to 0..1 per image; above k/255, k = 0..254; "
    "beta² = 0.3; F averaged over images per threshold, then the largest (TokenCut)",
    "maxF_selfmask": "the same with beta² = 0.09, each image at its own best threshold, averaged (SelfMask, FOUND)",
    "CorLoc": "box of the mask's largest part (patches that touch by their sides) has IoU >= .5 with any given box",
    "boxes": "those of the parts of the given mask; of VOC those of its annotations, difficult ones too",
    "center prior": "average of the other images' masks, 64 x 64; threshold best on these images, of .05 to .95",
    "patch ceiling": "each patch takes the majority of its pixels in the given mask: no mask of patches has more "
    "pixels right; its IoU is near the largest, not always the largest",
    "interval": "95 %, normal, over images, a threshold taken as given; of CorLoc Wilson's",
}


def write_record(
    config: AttentionConfig,
    network: LoadedBackbone,
    results: list[MethodResult],
    *,
    data: dict[str, Any],
    remarks: list[str],
    started: float,
) -> None:
    """Write `summary.json` into `config.out`: the scores, if any, and how maps, masks and scores came about.

    Args:
        config: Of the command.
        network: Whose attention it is.
        results: The model's first; empty without masks.
        data: Counts of the images, and their fingerprint.
        remarks: What a reader must know of how the given masks were read.
        started: When the maps were begun, in seconds of `time.perf_counter`.
    """
    device = network.backbone.device
    scores = [_describe(result.score(), config.attention_mass) for result in results]
    scores = scores or [ModelScores(name=MODEL, metrics=[])]
    ceiling = next((metric.value for score in scores for metric in score.metrics if score.name == CEILING), None)
    if ceiling is not None:
        scores[0] = _with_ceiling(scores[0], ceiling)
    names = [metric.name for metric in scores[0].metrics]
    left_out = {"skipped": "could not be used", "unscored": "have no usable mask"}
    EvalResult(
        task="attention",
        title="Object masks, IoU",
        main_metrics=[name for name in MAIN_METRICS if name in names],
        protocol={
            **PROTOCOL,
            **config.model_dump(mode="json", include={"attention_mass", "max_side", "methods", "refine"}),
        },
        model=ModelInfo(**provenance.model_metadata(network, config.checkpoint, config.weights)),
        data=DataInfo(
            name=config.images.resolve().stem if config.images else f"{config.voc} {config.split}",
            **config.model_dump(mode="json", include={"images", "masks", "voc", "split", "limit"}),
            **data,
        ),
        seeds={"pretrain": provenance.pretraining_seed(network.run), "evaluation": config.seed},
        score=scores[0],
        baselines=scores[1:],
        cost=provenance.runtime_cost(started, device),
        environment={**provenance.environment(device), "forward": "float32"},
        warnings=[f"{data[key]} images {what}" for key, what in left_out.items() if data[key]] + remarks,
    ).write(config.out / "summary.json")


def _describe(score: ModelScores, mass: float) -> ModelScores:
    """Add titles, notes and levels to the metrics."""
    metrics = []
    for metric in score.metrics:
        rule, _, head = metric.name.partition("/")
        title = (
            f"{RULES[rule].format(f'{100 * mass:g} %')}: {HEADS.get(head, head)}"
            if rule in RULES
            else f"masks by {rule}"
        )
        given = score.name == CEILING or rule == "area" or head == "oracle head"
        detail = metric.name.rpartition(" ")[2] in MEASURES or metric.name == BY_OBJECT
        level = "detail" if detail else "ground truth" if given else "score"
        note = "" if head == "mean" else PROTOCOL.get(head, "")
        metrics.append(metric.model_copy(update={"title": title, "note": note, "level": level}))
    return score.model_copy(update={"metrics": metrics})


def _with_ceiling(score: ModelScores, ceiling: float) -> ModelScores:
    """Note at each metric the highest IoU that masks of patches can have."""
    text = f"no mask of such patches reaches more than {ceiling:.2f}"
    metrics = [
        metric.model_copy(update={"note": f"{metric.note}; {text}" if metric.note else text})
        for metric in score.metrics
    ]
    return score.model_copy(update={"metrics": metrics})


def write_ious(path: Path, results: list[MethodResult], names: list[str]) -> None:
    """Every measure of every scored image, in the order of `images`: for paired comparisons of models.

    The keys are `<model or baseline>/<metric>`, as in `summary.json`.
    """
    if results:
        values: dict[str, Any] = {
            f"{result.name}/{metric}": of_images.numpy()
            for result in results
            for metric, of_images in result.values.items()
        }
        with atomic_write(path) as file:
            np.savez_compressed(file, images=np.array(names), **values)
