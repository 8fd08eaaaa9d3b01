"""Results of `ssl-vit attention`: the JSON, the scores of every image, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ssl_vit.config.visualize import AttentionConfig
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.eval_result import Change, DataInfo, EvalResult, Metric, ModelInfo, ModelScores
from ssl_vit.evaluation.results.statistics import normal_half_width, paired_mean_interval, wilson
from ssl_vit.evaluation.segmentation.segmentation_evaluator import (
    BASELINES,
    CEILING,
    CORLOC,
    INSTANCE_IOU,
    MEASURES,
    MODEL,
    RANDOM,
    START,
    MethodResult,
)
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.text import Row, format_table

MAIN_METRICS = ("mass/mean", "mass/fixed head", "tokencut")
RULES = {
    "mass": "masks with {:g} % of the attention",
    "area": "masks as large as the object (its size given)",
    "object": "masks of each object by itself",
}
HEADS = {"fixed head": "best fixed head", "mean": "mean of the heads", "oracle head": "each image's best head"}
BASELINE_TITLES = dict(zip(BASELINES, ("center prior", "whole image", "patch ceiling"), strict=True))
PROTOCOL = {
    "map": "[CLS] row of the last block's softmax over all tokens in float32; patches only, scaled to sum 1",
    "resize": "each side to the nearest multiple of the patch, bicubic, antialias; no crop, no padding",
    "mask of a map": "the fewest patches that hold `mass` of it; each pixel takes its patch's value, original size",
    "foreground": "the larger of two values of a mask, all labels but 0, or above half of white; or `mask_values`",
    "mass/...": "IoU of the masks",
    "area/...": "IoU of as many top patches as the foreground's area: the area is taken from the ground truth",
    "fixed head": "the best by IoU on one random half of the images, scored on the other, both ways",
    "mean": "the mask of the heads' mean map",
    "oracle head": "the best head of each image, by the IoU with its ground-truth mask",
    "object/...": "IoU with each object's own mask, averaged over the objects, then over the images; oracle head: "
    "the best head of each object (Caron et al. 2021, dino#54); fixed head and mean: one map for all objects",
    "lost, tokencut, pca, found": "IoU of the method's mask of patches; pca's components are those of 50 of these "
    "images, its signs by their borders, without the ground truth",
    "...+guided": "the mask (of attention: of the mean) through a guided filter with the image, at its size; it has "
    "no score map: the maxF are those of the mask",
    "void": "excluded from the intersection and the union, and from every other measure",
    "acc": "share of the pixels that the mask classifies correctly",
    "F@0.3": "F of the mask, beta² = 0.3, averaged over images: TokenCut's maxF without bilateral solver",
    "maxF@0.3": "score map, bilinear at the image's size, scaled to 0..1 per image; above k/255, k = 0..254; "
    "beta² = 0.3; F averaged over images per threshold, then the largest (TokenCut)",
    "maxF_selfmask": "the same with beta² = 0.09, each image at its own best threshold, averaged (SelfMask, FOUND)",
    "CorLoc": "box of the mask's largest part (patches that touch by their sides) has IoU >= .5 with any true box",
    "boxes": "those of the parts of the ground-truth mask; of VOC those of its annotations, difficult ones too",
    "center prior": "average of the other images' masks, 64 x 64; threshold best on these images, of .05 to .95",
    "patch ceiling": "each patch takes the majority of its pixels in the ground truth: no mask of patches has more "
    "pixels right; its IoU is near the largest, not always the largest",
    "interval": "95 %, normal, over images, a threshold taken as given; of CorLoc Wilson's",
}


def write_result(
    config: AttentionConfig,
    model: LoadedBackbone,
    results: list[MethodResult],
    *,
    data: dict[str, Any],
    notes: list[str],
    started: float,
) -> None:
    """Write `summary.json` into `config.out`.

    The results are those of the model, then of the baselines; none without ground truth. `data` has counts of the
    images and their fingerprint, `notes` tell how the ground truth was read, `started` is of `time.perf_counter`.
    """
    device = model.backbone.device
    ceiling = next((result.ious["IoU"] for result in results if result.name == CEILING and result.ious), None)
    bound = "" if ceiling is None else f"no mask of such patches reaches more than {ceiling.mean():.2f}"
    scores = [] if results else [ModelScores(name=MODEL, metrics=[])]
    for result in results:
        means = [_metric(*item, result.name, config.attention_mass, bound) for item in result.values.items()]
        scores.append(ModelScores(name=result.name, metrics=means, details=result.details))
    reasons = {"skipped": "could not be used", "unscored": "have no usable mask"}
    EvalResult(
        task="attention",
        title="Object masks, IoU",
        main_metrics=[metric.name for metric in scores[0].metrics if metric.name in MAIN_METRICS],
        protocol=PROTOCOL
        | config.model_dump(mode="json", include={"attention_mass", "max_side", "methods", "refine", "positions"}),
        model=ModelInfo(**provenance.model_metadata(model, config.checkpoint, config.weights)),
        data=DataInfo(
            name=config.images.resolve().stem if config.images else f"{config.voc} {config.split}",
            **config.model_dump(mode="json", include={"images", "masks", "voc", "split", "limit"}),
            **data,
        ),
        seeds={"pretrain": provenance.pretraining_seed(model.run), "evaluation": config.seed},
        score=scores[0],
        baselines=scores[1:],
        changes=changes_since_start(results),
        cost=provenance.runtime_cost(started, device),
        environment={**provenance.environment(device), "forward": "float32"},
        warnings=[f"{data[key]} images {reason}" for key, reason in reasons.items() if data[key]] + notes,
    ).write(config.out / "summary.json")


def _metric(name: str, values: Tensor, owner: str, mass: float, bound: str) -> Metric:
    """Return the mean of a metric `<rule>/<head>` or `<method>`, and its measure if not IoU, with title and notes."""
    rule, _, head = name.partition("/")
    title = f"{RULES[rule].format(100 * mass)}: {HEADS.get(head, head)}" if rule in RULES else f"masks by {name}"
    level: Literal["score", "ground truth", "detail"] = "score"
    if name == INSTANCE_IOU or name.rpartition(" ")[2] in MEASURES:
        level = "detail"
    elif owner == CEILING or rule == "area" or head == "oracle head":
        level = "ground truth"
    note = "; ".join(text for text in (PROTOCOL[head] if head in HEADS and head != "mean" else "", bound) if text)
    return mean_metric(name, values).model_copy(update={"title": title, "level": level, "note": note})


def mean_metric(name: str, values: Tensor) -> Metric:
    """Return the mean of per-image values (n,) with its 95 % interval over images: Wilson's for yes/no values.

    Else it is the normal one, which a single image does not have; that of maxF@0.3 takes the threshold as given.
    """
    n, mean = len(values), values.double().mean().item()
    if values.dtype.is_floating_point:
        half = normal_half_width(values) if n > 1 else 1.0
        low, high, interval = max(0.0, mean - half), min(1.0, mean + half), "normal, over images"
    else:
        (low, high), interval = wilson(int(values.sum()), n), "Wilson"
    return Metric(name=name, value=mean, n=n, low=low, high=high, interval=interval)


def write_image_scores(path: Path, results: list[MethodResult], names: list[str]) -> None:
    """Write every metric of every scored image, in the order of `images`: for paired comparisons of models.

    The keys are `<model or baseline>/<metric>`, as in `summary.json`.
    """
    values: dict[str, Any] = {
        f"{result.name}/{name}": of_images.numpy() for result in results for name, of_images in result.values.items()
    }
    if values:
        with atomic_write(path) as file:
            np.savez_compressed(file, images=np.array(names), **values)


def changes_since_start(results: list[MethodResult]) -> list[Change]:
    """Return how the IoU of the masks changed since the start weights, on the same images; needs two of them."""
    start = next((result for result in results if result.name == START), None)
    changes = []
    for name in MAIN_METRICS if start else ():
        before, after = (result.ious.get(name) for result in (start, results[0]) if result)
        if before is not None and after is not None and len(after) > 1:
            low, high, p = paired_mean_interval(before, after)
            means = {"before": before.mean().item(), "after": after.mean().item()}
            changes.append(Change(metric=f"IoU of {name}", **means, low=low, high=high, p=p))
    return changes


def score_table(results: list[MethodResult], *, mass: float) -> str:
    """Return the model's means (of boxes CorLoc alone), other models' IoU, the baselines, and the changes."""
    model, count = results[0], len(next(iter(results[0].values.values())))
    if not model.ious:
        return format_table(_corloc_rows(results), [f"{CORLOC} of {count} images", "± 95 %"])
    others = [result for result in results if result.name in (RANDOM, START)]
    rows: list[Row] = []
    for rule, title in {**RULES, "": "other methods"}.items():
        names = [name for name in model.ious if name.rpartition("/")[0] == rule]
        if names:
            rows.append([title.format(100 * mass)])
        for name in names:
            head = name.rpartition("/")[2]
            label = "each object's best head" if name == "object/oracle head" else HEADS.get(head, head)
            rows.append(_row(label, name, model, others))
        if names and rule == "object":
            objects = {result.name: result.others for result in results if INSTANCE_IOU in result.others}
            rows += [[f"  {BASELINE_TITLES[name]}", _cell(values[INSTANCE_IOU])] for name, values in objects.items()]
    rows.append(["without a model"])
    rows += [_row(BASELINE_TITLES[result.name], "", result) for result in results if result.name in BASELINES]
    table = format_table(rows, [f"IoU of {count} images", "± 95 %", *MEASURES, *(result.name for result in others)])
    note = "\none image: no intervals, no fixed head and no center prior, which need other images"
    changes = "".join(f"\n{change}" for change in changes_since_start(results))
    return table + changes + (note if count == 1 else "")


def _row(title: str, name: str, result: MethodResult, others: Sequence[MethodResult] = ()) -> Row:
    """Return the IoU and the other measures of a rule or method (of a baseline: no name), and other models' IoU."""
    keys = [f"{name} {measure}".strip() for measure in MEASURES]
    measures = [_mean(result.others[key]) if key in result.others else "" for key in keys]
    return [f"  {title}", _cell(result.ious[name or "IoU"]), *measures, *(_mean(other.ious[name]) for other in others)]


def _corloc_rows(results: list[MethodResult]) -> list[Row]:
    return [
        [f"{BASELINE_TITLES.get(result.name, result.name)} {name.removesuffix(CORLOC)}".strip(), _cell(values)]
        for result in results
        for name, values in result.others.items()
    ]


def _mean(values: Tensor) -> str:
    return f"{values.double().mean().item():.3f}"


def _cell(values: Tensor) -> str:
    metric = mean_metric("", values)
    return f"{metric.value:.3f}" + (f" ± {(metric.high - metric.low) / 2:.3f}" if metric.n > 1 else " ± -")
