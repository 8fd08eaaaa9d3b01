"""What many pictures are worth, gathered one at a time: every rule and method, each network, beside the baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.attention.metrics import (
    THRESHOLDS,
    HeadScores,
    Scores,
    centre_prior,
    choose_heads,
    count_truth,
    fixed_head,
    majority,
    oracle_head,
    stack_scores,
)
from ssl_vit.attention.saliency import Measures, at_best_threshold
from ssl_vit.attention.scoring import (
    AttentionMarks,
    Marks,
    Objects,
    Squashed,
    ceiling_by_object,
    mark,
    mark_attention,
    mark_prior,
    mean_over_objects,
    pick,
    prior_by_object,
    squash,
    stack_marks,
)
from ssl_vit.attention.truth import Annotation
from ssl_vit.records.intervals import wilson
from ssl_vit.records.record import Metric, Score

NETWORK, RANDOM = "network", "random init"
BASELINES = ("centre prior", "all foreground", "patch ceiling")
CORLOC = "CorLoc"
BY_OBJECT = "object IoU"  # of a baseline: with each object by itself
MEASURES = ("acc", "F@0.3", "maxF@0.3", "maxF_selfmask", CORLOC)  # beside the IoU


class Result(NamedTuple):
    """What one network, or one baseline, reached on n pictures."""

    name: str
    ious: dict[str, Tensor]  # (n,) each, by rule or method; of a baseline: IoU
    others: dict[str, Tensor]  # (n,) each: "<rule> <measure>"; of a baseline "<measure>"
    details: dict[str, Any]

    def score(self) -> Score:
        """The means over the pictures, with their intervals."""
        return Score(self.name, [mean(name, values) for name, values in self.values.items()], self.details)

    @property
    def values(self) -> dict[str, Tensor]:
        """All of it, by the names of the metrics."""
        return self.ious | self.others


class _Scored(NamedTuple):
    """What is kept of one picture."""

    attention: list[AttentionMarks]  # per network; empty where it is not wanted
    methods: list[dict[str, Marks]]  # per network
    squashed: Squashed
    baselines: dict[str, Marks]  # those that no other picture is needed for
    by_object: dict[str, Tensor]  # their IoU () with each object, in the mean; empty where objects are not told apart


_KEPT: list[Any] = [_Scored, AttentionMarks, Marks, Measures, Scores, HeadScores, Squashed]


class Summary:
    """Scores of one or two networks on the same pictures.

    Of each picture are kept its scores, its F at 255 thresholds and the 64 x 64 outline of its mask: some 80 kB. They
    wait in files for the end. In memory they would lie between the large maps of the pictures that come and go, which
    the C library then fits in ever anew behind them: several MB for each picture.

    Args:
        folder: Empty, for these files; nobody needs them afterwards.
        mass: Share of the attention that a mask holds.
        seed: Of the halves between which the fixed head is chosen.
    """

    def __init__(self, folder: Path, *, mass: float, seed: int) -> None:
        self.mass = mass
        self.seed = seed
        self.places: list[int] = []  # of the scored pictures among all
        self._boxes_alone = False
        self._folder = folder

    def add(self, place: int, seen: list[Objects], given: Annotation) -> None:
        """Score what each network finds in one picture."""
        rows, columns = _grid(seen[0])
        truth = count_truth(given.object, (rows, columns), given.counted)
        masks = {
            "all foreground": torch.ones(1, rows, columns, dtype=torch.bool),
            "patch ceiling": majority(truth)[None],
        }
        scored = _Scored(
            [mark_attention(objects.maps, self.mass, given) for objects in seen if objects.maps is not None],
            [
                {name: mark(found.soft[None], found.mask[None], given) for name, found in objects.methods.items()}
                for objects in seen
            ],
            squash(given),
            {name: mark(mask.float(), mask, given) for name, mask in masks.items()},
            {},
        )
        if given.instances is not None:
            scored.by_object["all foreground"] = mean_over_objects(
                masks["all foreground"][0], given.instances, given.counted
            )
            scored.by_object["patch ceiling"] = ceiling_by_object(given.instances, given.counted, (rows, columns))
        torch.save(scored, self._folder / f"{len(self.places)}.pt")
        self.places.append(place)
        self._boxes_alone = not given.masked

    def results(self) -> list[Result]:
        """The network, its random twin if it took part, and the baselines that need no network.

        The fixed head and the centre prior need two pictures and are left out with one.
        """
        with torch.serialization.safe_globals(_KEPT):
            files = [self._folder / f"{number}.pt" for number in range(len(self.places))]
            pictures: list[_Scored] = [torch.load(file, weights_only=True) for file in files]
        results = [
            self._of_network(pictures, number, name)
            for number, name in enumerate((NETWORK, RANDOM)[: len(pictures[0].methods)])
        ]
        if len(pictures) > 1:
            squashed = [picture.squashed for picture in pictures]
            _, threshold = centre_prior(torch.stack([own.object for own in squashed]))
            results.append(_of_baseline("centre prior", mark_prior(squashed, threshold), threshold=threshold))
            if pictures[0].by_object:
                results[-1].others[BY_OBJECT] = prior_by_object(squashed, threshold)
        for name in pictures[0].baselines:
            results.append(_of_baseline(name, [picture.baselines[name] for picture in pictures]))
            if pictures[0].by_object:
                results[-1].others[BY_OBJECT] = torch.stack([picture.by_object[name] for picture in pictures])
        if self._boxes_alone:
            results = [_located_alone(result) for result in results]
        return results

    def _of_network(self, pictures: list[_Scored], network: int, name: str) -> Result:
        result = Result(name, {}, {}, {"thresholds of maxF@0.3": {}})
        if pictures[0].attention:
            self._add_attention([picture.attention[network] for picture in pictures], result)
        for method in pictures[0].methods[network]:
            marks = stack_marks([picture.methods[network][method] for picture in pictures])
            result.ious[method] = marks.measures.iou[:, 0]
            _add_others(result, method, marks)
        return result

    def _add_attention(self, pictures: list[AttentionMarks], result: Result) -> None:
        """The head rules; the fixed head is chosen by the IoU of the masks that it is scored on."""
        several = len(pictures) > 1
        chosen: dict[str, list[int]] = {}
        for rule, scores in stack_scores([picture.scores for picture in pictures])._asdict().items():
            if several:
                result.ious[f"{rule}/fixed head"], chosen[rule] = fixed_head(scores, self.seed)
            result.ious[f"{rule}/mean"] = scores.mean
            result.ious[f"{rule}/oracle head"] = oracle_head(scores)
        marks = stack_marks([picture.marks for picture in pictures])
        heads = marks.measures.iou[:, :-1]  # (n, heads)
        columns = {"mean": torch.full((len(pictures),), heads.shape[1]), "oracle head": heads.argmax(1)}
        if several:
            columns = {"fixed head": choose_heads(heads, self.seed)[0], **columns}
        for rule, column in columns.items():
            _add_others(result, f"mass/{rule}", pick(marks, column))
        objects = [picture.objects for picture in pictures if picture.objects is not None]  # (objects, heads + 1) each
        if objects:
            by_head = torch.stack([ious.mean(0) for ious in objects])  # (n, heads + 1)
            if several:
                result.ious["object/fixed head"], chosen["object"] = fixed_head(
                    HeadScores(by_head[:, :-1], by_head[:, -1]), self.seed
                )
            result.ious["object/mean"] = by_head[:, -1]
            result.ious["object/oracle head"] = torch.stack([ious[:, :-1].amax(1).mean() for ious in objects])
        result.details["fixed heads"] = chosen
        result.details["IoU by mass"] = self._curve(torch.stack([picture.curve for picture in pictures]))

    def _curve(self, ious: Tensor) -> dict[str, list[float]]:
        """The mean IoU by the share of the attention that the masks hold, from (n, 19, heads + 1)."""
        heads = ious[..., :-1]
        curve = {"mass": THRESHOLDS.tolist(), "mean": ious[..., -1].mean(0).tolist()}
        curve["oracle head"] = heads.amax(-1).mean(0).tolist()
        if len(ious) > 1:
            at_each = [heads[:, place] for place in range(heads.shape[1])]  # (n, heads) each
            curve["fixed head"] = [
                fixed_head(HeadScores(one, one[:, 0]), self.seed)[0].mean().item() for one in at_each
            ]
        return curve


def mean(name: str, values: Tensor) -> Metric:
    """The mean of per-picture values (n,), with its 95 % interval over pictures.

    It is Wilson's for what a picture has or has not, else the normal one; one picture has none. The interval of
    maxF@0.3 takes the threshold as given.
    """
    n, average = len(values), values.double().mean().item()
    if values.dtype == torch.bool:
        low, high = wilson(int(values.sum()), n)
        return Metric(name, average, n, low, high)
    half = 1.959964 * values.std().item() / n**0.5 if n > 1 else 1.0
    return Metric(
        name, average, n, max(0.0, average - half), min(1.0, average + half), interval="normal, over pictures"
    )


def _grid(objects: Objects) -> tuple[int, int]:
    """Rows and columns of patches."""
    soft = objects.maps if objects.maps is not None else next(iter(objects.methods.values())).soft
    return soft.shape[-2], soft.shape[-1]


def _of_baseline(name: str, pictures: list[Marks], **details: float) -> Result:
    marks = stack_marks(pictures)
    result = Result(name, {"IoU": marks.measures.iou[:, 0]}, {}, {**details, "thresholds of maxF@0.3": {}})
    _add_others(result, "", marks)
    return result


def _add_others(result: Result, rule: str, marks: Marks) -> None:
    """All measures but the IoU, of marks (n, 1)."""
    measures = marks.measures
    at_best, threshold = at_best_threshold(measures.f_curve[:, 0])
    values = (measures.accuracy[:, 0], measures.f[:, 0], at_best, measures.f_selfmask[:, 0], marks.located[:, 0])
    for measure, of_pictures in zip(MEASURES, values, strict=True):
        result.others[f"{rule} {measure}".strip()] = of_pictures
    result.details["thresholds of maxF@0.3"][rule or "mask"] = threshold


def _located_alone(result: Result) -> Result:
    """What can be said where boxes are given and no masks."""
    located = {name: values for name, values in result.others.items() if name.endswith(CORLOC)}
    return Result(result.name, {}, located, {})
