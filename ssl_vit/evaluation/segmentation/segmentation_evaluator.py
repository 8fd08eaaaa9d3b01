"""Evaluate masks of many images: every rule and method, each model, and the baselines without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.annotations.object_masks import Annotation
from ssl_vit.evaluation.segmentation.iou import (
    THRESHOLDS,
    center_prior,
    choose_heads,
    cross_validated_iou,
    majority_patches,
    pool_mask_to_patches,
)
from ssl_vit.evaluation.segmentation.mask_scores import (
    AttentionScores,
    MaskScores,
    PredictedMasks,
    max_f_threshold,
    mean_instance_iou,
    resize_annotation,
    score_attention,
    score_center_prior,
    score_masks,
    select_columns,
    stack_mask_scores,
)

MODEL, RANDOM, START = "model", "random init", "start weights"
PRIOR, WHOLE, CEILING = BASELINES = ("center prior", "all foreground", "patch ceiling")
CORLOC = "CorLoc"
INSTANCE_IOU = "object IoU"  # of a baseline: with each object
MEASURES = ("acc", "F@0.3", "maxF@0.3", "maxF_selfmask", CORLOC)  # beside the IoU


class MethodResult(NamedTuple):
    """Scores of one model or baseline for n images."""

    name: str
    ious: dict[str, Tensor]  # (n,) each, by rule or method; of a baseline: IoU
    others: dict[str, Tensor]  # (n,) each: "<rule> <measure>"; of a baseline "<measure>"
    details: dict[str, Any]

    @property
    def values(self) -> dict[str, Tensor]:
        """All scores by the names of the metrics."""
        return self.ious | self.others


class _Scored(NamedTuple):
    """Scores of one image."""

    attention: list[AttentionScores]  # per model; empty if it is not among the methods
    methods: list[dict[str, MaskScores]]  # per model
    resized: Annotation
    baselines: dict[str, MaskScores]  # those that need no other image
    instance_ious: dict[str, Tensor]  # their IoU () with each object, averaged; empty without instance masks


_STORED: list[Any] = [_Scored, AttentionScores, MaskScores, Annotation]


class SegmentationEvaluator:
    """Streaming evaluation of up to three models on the same images.

    The scores of each image (some 80 kB) are stored in files until the end: in memory they would lie between the large
    maps of the images that come and go, and fragment the heap by several MB for each image.

    Args:
        folder: Empty, for these temporary files.
        mass: Share of the attention inside a mask.
        seed: Of the halves between which the fixed head is chosen.
    """

    def __init__(self, folder: Path, *, mass: float, seed: int) -> None:
        self.mass = mass
        self.seed = seed
        self.indices: list[int] = []  # of the scored images in the dataset
        self._boxes_only = False
        self._folder = folder

    def update(self, index: int, predicted: list[PredictedMasks], annotation: Annotation) -> None:
        """Score the masks that each model predicts for one image."""
        maps, methods_of = predicted[0]
        map_ = next(iter(methods_of.values())).score_map if maps is None else maps
        grid = (map_.shape[-2], map_.shape[-1])
        whole = torch.ones(grid, dtype=torch.bool)
        ceiling = majority_patches(pool_mask_to_patches(annotation.foreground, grid, annotation.valid))
        attention = [score_attention(one.maps, self.mass, annotation) for one in predicted if one.maps is not None]
        methods = [
            {
                name: score_masks(found.score_map[None], found.mask[None], annotation)
                for name, found in one.methods.items()
            }
            for one in predicted
        ]
        baselines = {
            name: score_masks(mask[None].float(), mask[None], annotation)
            for name, mask in ((WHOLE, whole), (CEILING, ceiling))
        }
        instance_ious = {}
        if annotation.instances is not None:
            instance_ious[WHOLE] = mean_instance_iou(annotation, grid, whole)
            instance_ious[CEILING] = mean_instance_iou(annotation, grid)
        scored = _Scored(attention, methods, resize_annotation(annotation), baselines, instance_ious)
        torch.save(scored, self._folder / f"{len(self.indices)}.pt")
        self.indices.append(index)
        self._boxes_only = not annotation.has_masks

    def compute(self) -> list[MethodResult]:
        """Return the scores of the model, of random init and the start weights if there are any, and of the baselines.

        The fixed head and the center prior need two images and are excluded with one.
        """
        with torch.serialization.safe_globals(_STORED):
            files = [self._folder / f"{number}.pt" for number in range(len(self.indices))]
            images: list[_Scored] = [torch.load(file, weights_only=True) for file in files]
        names = (MODEL, RANDOM, START)[: len(images[0].methods)]
        results = [self._model_result(images, number, name) for number, name in enumerate(names)]
        if len(images) > 1:
            resized = [image.resized for image in images]
            _, threshold = center_prior(torch.stack([own.foreground for own in resized]))
            results.append(_baseline_result(PRIOR, *score_center_prior(resized, threshold), threshold=threshold))
        for name in images[0].baselines:
            instance_ious = [image.instance_ious[name] for image in images if image.instance_ious]
            results.append(_baseline_result(name, [image.baselines[name] for image in images], instance_ious))
        if self._boxes_only:  # no metric but CorLoc is defined
            corloc = [{key: values for key, values in one.others.items() if key.endswith(CORLOC)} for one in results]
            return [MethodResult(one.name, {}, others, {}) for one, others in zip(results, corloc, strict=True)]
        return results

    def _model_result(self, images: list[_Scored], model: int, name: str) -> MethodResult:
        result = MethodResult(name, {}, {}, {"thresholds of maxF@0.3": {}})
        if images[0].attention:
            self._add_attention([image.attention[model] for image in images], result)
        for method in images[0].methods[model]:
            scores = stack_mask_scores([image.methods[model][method] for image in images])
            result.ious[method] = scores.iou[:, 0]
            _add_measures(result, method, scores)
        return result

    def _add_attention(self, images: list[AttentionScores], result: MethodResult) -> None:
        """Add every rule of choosing a head; the fixed head is chosen by the IoU of the masks that it is scored on."""
        chosen: dict[str, list[int]] = {}
        for rule in images[0].ious:
            ious = torch.stack([image.ious[rule] for image in images])  # (n, heads + 1)
            self._add_head_rules(result, rule, ious, ious[:, :-1].amax(1), chosen)
        scores = stack_mask_scores([image.masks for image in images])
        heads = scores.iou[:, :-1]  # (n, heads)
        columns = {"mean": torch.full((len(images),), heads.shape[1]), "oracle head": heads.argmax(1)}
        if len(images) > 1:
            columns = {"fixed head": choose_heads(heads, self.seed)[0], **columns}
        for rule, column in columns.items():
            _add_measures(result, f"mass/{rule}", select_columns(scores, column))
        instances = [image.instance_ious for image in images if image.instance_ious is not None]  # (objects, heads + 1)
        if instances:
            by_head = torch.stack([ious.mean(0) for ious in instances])  # (n, heads + 1)
            oracle = torch.stack([ious[:, :-1].amax(1).mean() for ious in instances])
            self._add_head_rules(result, "object", by_head, oracle, chosen)
        result.details["fixed heads"] = chosen
        result.details["IoU by mass"] = self._curve([image.curve for image in images])

    def _add_head_rules(
        self, result: MethodResult, rule: str, ious: Tensor, oracle: Tensor, chosen: dict[str, list[int]]
    ) -> None:
        """Add the IoUs of a threshold rule, from those of the heads and, last, of their mean (n, heads + 1)."""
        if len(ious) > 1:
            result.ious[f"{rule}/fixed head"], chosen[rule] = cross_validated_iou(ious[:, :-1], self.seed)
        result.ious[f"{rule}/mean"] = ious[:, -1]
        result.ious[f"{rule}/oracle head"] = oracle

    def _curve(self, curves: list[Tensor]) -> dict[str, list[float]]:
        """Compute the mean IoU by the share of the attention inside the masks, from (19, heads + 1) of each image."""
        ious = torch.stack(curves)
        heads, means = ious[..., :-1], ious[..., -1]
        curve = {"mass": THRESHOLDS, "mean": means.mean(0), "oracle head": heads.amax(-1).mean(0)}
        if len(ious) > 1:
            fixed = [cross_validated_iou(by_image, self.seed)[0].mean() for by_image in heads.unbind(1)]
            curve["fixed head"] = torch.stack(fixed)
        return {name: values.tolist() for name, values in curve.items()}


def _baseline_result(
    name: str, images: list[MaskScores], instance_ious: list[Tensor], **details: float
) -> MethodResult:
    scores = stack_mask_scores(images)
    result = MethodResult(name, {"IoU": scores.iou[:, 0]}, {}, {**details, "thresholds of maxF@0.3": {}})
    _add_measures(result, "", scores)
    if instance_ious:
        result.others[INSTANCE_IOU] = torch.stack(instance_ious)
    return result


def _add_measures(result: MethodResult, rule: str, scores: MaskScores) -> None:
    """Add all measures but the IoU, of scores (n, 1)."""
    max_f, threshold = max_f_threshold(scores.f_curve[:, 0])
    values = (scores.accuracy[:, 0], scores.f[:, 0], max_f, scores.f_selfmask[:, 0], scores.corloc[:, 0])
    for measure, of_images in zip(MEASURES, values, strict=True):
        result.others[f"{rule} {measure}".strip()] = of_images
    result.details["thresholds of maxF@0.3"][rule or "mask"] = threshold
