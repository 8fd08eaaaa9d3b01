"""What many images are worth, gathered one at a time: every rule and method, each model, beside the baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.annotations.object_masks import Annotation
from ssl_vit.evaluation.results.eval_result import Metric, ModelScores
from ssl_vit.evaluation.results.statistics import normal_half_width, wilson
from ssl_vit.evaluation.segmentation.iou import (
    THRESHOLDS,
    HeadIoU,
    IoUByRule,
    center_prior,
    choose_heads,
    cross_validated_head,
    majority_patches,
    oracle_head,
    pool_mask_to_patches,
    stack_scores,
)
from ssl_vit.evaluation.segmentation.mask_scores import (
    AttentionScores,
    MaskScores,
    PredictedMasks,
    PriorSample,
    ceiling_by_object,
    mark_attention,
    mark_prior,
    mean_over_objects,
    prior_by_object,
    resize_annotation,
    score_masks,
    select_columns,
    stack_marks,
)
from ssl_vit.evaluation.segmentation.saliency_metrics import SaliencyScores, max_f_threshold

MODEL, RANDOM = "model", "random init"
BASELINES = ("center prior", "all foreground", "patch ceiling")
CORLOC = "CorLoc"
BY_OBJECT = "object IoU"  # of a baseline: with each object by itself
MEASURES = ("acc", "F@0.3", "maxF@0.3", "maxF_selfmask", CORLOC)  # beside the IoU


class MethodResult(NamedTuple):
    """What one model, or one baseline, reached on n images."""

    name: str
    ious: dict[str, Tensor]  # (n,) each, by rule or method; of a baseline: IoU
    others: dict[str, Tensor]  # (n,) each: "<rule> <measure>"; of a baseline "<measure>"
    details: dict[str, Any]

    def score(self) -> ModelScores:
        """The means over the images, with their intervals."""
        metrics = [mean(name, values) for name, values in self.values.items()]
        return ModelScores(name=self.name, metrics=metrics, details=self.details)

    @property
    def values(self) -> dict[str, Tensor]:
        """All of it, by the names of the metrics."""
        return self.ious | self.others


class _Scored(NamedTuple):
    """What is kept of one image."""

    attention: list[AttentionScores]  # per model; empty where it is not wanted
    methods: list[dict[str, MaskScores]]  # per model
    squashed: PriorSample
    baselines: dict[str, MaskScores]  # those that no other image is needed for
    by_object: dict[str, Tensor]  # their IoU () with each object, in the mean; empty where objects are not told apart


_KEPT: list[Any] = [_Scored, AttentionScores, MaskScores, SaliencyScores, IoUByRule, HeadIoU, PriorSample]


class Summary:
    """Scores of one or two models on the same images.

    Of each image are kept its scores, its F at 255 thresholds and the 64 x 64 outline of its mask: some 80 kB. They
    wait in files for the end. In memory they would lie between the large maps of the images that come and go, which
    the C library then fits in ever anew behind them: several MB for each image.

    Args:
        folder: Empty, for these files; nobody needs them afterwards.
        mass: Share of the attention that a mask holds.
        seed: Of the halves between which the fixed head is chosen.
    """

    def __init__(self, folder: Path, *, mass: float, seed: int) -> None:
        self.mass = mass
        self.seed = seed
        self.places: list[int] = []  # of the scored images among all
        self._boxes_alone = False
        self._folder = folder

    def add(self, place: int, seen: list[PredictedMasks], given: Annotation) -> None:
        """Score what each model finds in one image."""
        rows, columns = _grid(seen[0])
        truth = pool_mask_to_patches(given.foreground, (rows, columns), given.valid)
        masks = {
            "all foreground": torch.ones(1, rows, columns, dtype=torch.bool),
            "patch ceiling": majority_patches(truth)[None],
        }
        scored = _Scored(
            [mark_attention(objects.maps, self.mass, given) for objects in seen if objects.maps is not None],
            [
                {
                    name: score_masks(found.soft[None], found.mask[None], given)
                    for name, found in objects.methods.items()
                }
                for objects in seen
            ],
            resize_annotation(given),
            {name: score_masks(mask.float(), mask, given) for name, mask in masks.items()},
            {},
        )
        if given.instances is not None:
            scored.by_object["all foreground"] = mean_over_objects(
                masks["all foreground"][0], given.instances, given.valid
            )
            scored.by_object["patch ceiling"] = ceiling_by_object(given.instances, given.valid, (rows, columns))
        torch.save(scored, self._folder / f"{len(self.places)}.pt")
        self.places.append(place)
        self._boxes_alone = not given.has_masks

    def results(self) -> list[MethodResult]:
        """The model, its random-init model if it took part, and the baselines that need no model.

        The fixed head and the center prior need two images and are left out with one.
        """
        with torch.serialization.safe_globals(_KEPT):
            files = [self._folder / f"{number}.pt" for number in range(len(self.places))]
            dataset: list[_Scored] = [torch.load(file, weights_only=True) for file in files]
        results = [
            self._of_model(dataset, number, name)
            for number, name in enumerate((MODEL, RANDOM)[: len(dataset[0].methods)])
        ]
        if len(dataset) > 1:
            squashed = [image.squashed for image in dataset]
            _, threshold = center_prior(torch.stack([own.object for own in squashed]))
            results.append(_of_baseline("center prior", mark_prior(squashed, threshold), threshold=threshold))
            if dataset[0].by_object:
                results[-1].others[BY_OBJECT] = prior_by_object(squashed, threshold)
        for name in dataset[0].baselines:
            results.append(_of_baseline(name, [image.baselines[name] for image in dataset]))
            if dataset[0].by_object:
                results[-1].others[BY_OBJECT] = torch.stack([image.by_object[name] for image in dataset])
        if self._boxes_alone:
            results = [_located_alone(result) for result in results]
        return results

    def _of_model(self, dataset: list[_Scored], model: int, name: str) -> MethodResult:
        result = MethodResult(name, {}, {}, {"thresholds of maxF@0.3": {}})
        if dataset[0].attention:
            self._add_attention([image.attention[model] for image in dataset], result)
        for method in dataset[0].methods[model]:
            marks = stack_marks([image.methods[model][method] for image in dataset])
            result.ious[method] = marks.measures.iou[:, 0]
            _add_others(result, method, marks)
        return result

    def _add_attention(self, dataset: list[AttentionScores], result: MethodResult) -> None:
        """The head rules; the fixed head is chosen by the IoU of the masks that it is scored on."""
        several = len(dataset) > 1
        chosen: dict[str, list[int]] = {}
        for rule, scores in stack_scores([image.scores for image in dataset])._asdict().items():
            if several:
                result.ious[f"{rule}/fixed head"], chosen[rule] = cross_validated_head(scores, self.seed)
            result.ious[f"{rule}/mean"] = scores.mean
            result.ious[f"{rule}/oracle head"] = oracle_head(scores)
        marks = stack_marks([image.marks for image in dataset])
        heads = marks.measures.iou[:, :-1]  # (n, heads)
        columns = {"mean": torch.full((len(dataset),), heads.shape[1]), "oracle head": heads.argmax(1)}
        if several:
            columns = {"fixed head": choose_heads(heads, self.seed)[0], **columns}
        for rule, column in columns.items():
            _add_others(result, f"mass/{rule}", select_columns(marks, column))
        objects = [image.objects for image in dataset if image.objects is not None]  # (objects, heads + 1) each
        if objects:
            by_head = torch.stack([ious.mean(0) for ious in objects])  # (n, heads + 1)
            if several:
                result.ious["object/fixed head"], chosen["object"] = cross_validated_head(
                    HeadIoU(by_head[:, :-1], by_head[:, -1]), self.seed
                )
            result.ious["object/mean"] = by_head[:, -1]
            result.ious["object/oracle head"] = torch.stack([ious[:, :-1].amax(1).mean() for ious in objects])
        result.details["fixed heads"] = chosen
        result.details["IoU by mass"] = self._curve(torch.stack([image.curve for image in dataset]))

    def _curve(self, ious: Tensor) -> dict[str, list[float]]:
        """The mean IoU by the share of the attention that the masks hold, from (n, 19, heads + 1)."""
        heads = ious[..., :-1]
        curve = {"mass": THRESHOLDS.tolist(), "mean": ious[..., -1].mean(0).tolist()}
        curve["oracle head"] = heads.amax(-1).mean(0).tolist()
        if len(ious) > 1:
            at_each = [heads[:, place] for place in range(heads.shape[1])]  # (n, heads) each
            curve["fixed head"] = [
                cross_validated_head(HeadIoU(one, one[:, 0]), self.seed)[0].mean().item() for one in at_each
            ]
        return curve


def mean(name: str, values: Tensor) -> Metric:
    """The mean of per-image values (n,), with its 95 % interval over images.

    It is Wilson's for what an image has or has not, else the normal one; one image has none. The interval of
    maxF@0.3 takes the threshold as given.
    """
    n, average = len(values), values.double().mean().item()
    if values.dtype == torch.bool:
        low, high = wilson(int(values.sum()), n)
        return Metric(name=name, value=average, n=n, low=low, high=high)
    half = normal_half_width(values) if n > 1 else 1.0
    low, high = max(0.0, average - half), min(1.0, average + half)
    return Metric(name=name, value=average, n=n, low=low, high=high, interval="normal, over images")


def _grid(objects: PredictedMasks) -> tuple[int, int]:
    """Rows and columns of patches."""
    soft = objects.maps if objects.maps is not None else next(iter(objects.methods.values())).soft
    return soft.shape[-2], soft.shape[-1]


def _of_baseline(name: str, dataset: list[MaskScores], **details: float) -> MethodResult:
    marks = stack_marks(dataset)
    result = MethodResult(name, {"IoU": marks.measures.iou[:, 0]}, {}, {**details, "thresholds of maxF@0.3": {}})
    _add_others(result, "", marks)
    return result


def _add_others(result: MethodResult, rule: str, marks: MaskScores) -> None:
    """All measures but the IoU, of marks (n, 1)."""
    measures = marks.measures
    at_best, threshold = max_f_threshold(measures.f_curve[:, 0])
    values = (measures.accuracy[:, 0], measures.f[:, 0], at_best, measures.f_selfmask[:, 0], marks.located[:, 0])
    for measure, of_images in zip(MEASURES, values, strict=True):
        result.others[f"{rule} {measure}".strip()] = of_images
    result.details["thresholds of maxF@0.3"][rule or "mask"] = threshold


def _located_alone(result: MethodResult) -> MethodResult:
    """What can be said where boxes are given and no masks."""
    located = {name: values for name, values in result.others.items() if name.endswith(CORLOC)}
    return MethodResult(result.name, {}, located, {})
