"""IoUs of many pictures, gathered one at a time: by every head rule, for each network, beside the baselines."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.attention.metrics import (
    Scores,
    all_foreground,
    centre_prior,
    count_truth,
    fixed_head,
    majority_ceiling,
    oracle_head,
    outline,
    score,
    stack_scores,
)
from ssl_vit.records.record import Metric, Score

NETWORK, RANDOM = "network", "random init"
HEAD_RULES = {
    "fixed head": "best fixed head",
    "mean": "mean of the heads",
    "oracle head": "oracle: each picture's best head",
}
BASELINES = {
    "centre prior": "centre prior: the average mask",
    "all foreground": "the whole picture",
    "patch ceiling": "ceiling: every patch as its majority",
}


class Result(NamedTuple):
    """What one network, or one baseline, reached on n pictures."""

    name: str
    ious: dict[str, Tensor]  # (n,) each, by rule
    details: dict[str, Any]

    def score(self) -> Score:
        """The means over the pictures, with their intervals."""
        return Score(self.name, [_mean(name, values) for name, values in self.ious.items()], self.details)


class Summary:
    """Scores of one or two networks on the same pictures.

    Of each picture stay its IoUs and the 64 x 64 outline of its mask.

    Args:
        mass: Share of the attention that a mask holds.
        seed: Of the halves between which the fixed head is chosen.
    """

    def __init__(self, *, mass: float, seed: int) -> None:
        self.mass = mass
        self.seed = seed
        self.places: list[int] = []  # of the scored pictures among all
        self._scores: list[list[Scores]] = []  # per picture, per network
        self._outlines: list[Tensor] = []
        self._ceiling: list[Tensor] = []
        self._foreground: list[Tensor] = []

    def add(self, place: int, maps: list[Tensor], truth: Tensor) -> None:
        """Score one picture's maps, (heads, rows, columns) per network, by its object mask (H, W) bool."""
        counted = count_truth(truth, (maps[0].shape[-2], maps[0].shape[-1]))
        self.places.append(place)
        self._scores.append([score(of_network, counted, self.mass) for of_network in maps])
        self._outlines.append(outline(truth))
        self._ceiling.append(majority_ceiling(counted))
        self._foreground.append(all_foreground(counted))

    def results(self) -> list[Result]:
        """The network, its random twin if it took part, and the baselines that need no network.

        The fixed head and the centre prior need two pictures and are left out with one.
        """
        results = [
            self._of_network(name, list(scores))
            for name, scores in zip((NETWORK, RANDOM), zip(*self._scores, strict=True), strict=False)
        ]
        if len(self.places) > 1:
            prior, threshold = centre_prior(torch.stack(self._outlines))
            results.append(Result("centre prior", {"IoU": prior}, {"threshold": threshold}))
        results.append(Result("all foreground", {"IoU": torch.stack(self._foreground)}, {}))
        results.append(Result("patch ceiling", {"IoU": torch.stack(self._ceiling)}, {}))
        return results

    def _of_network(self, name: str, pictures: list[Scores]) -> Result:
        ious: dict[str, Tensor] = {}
        chosen = {}
        for rule, scores in stack_scores(pictures)._asdict().items():
            if len(self.places) > 1:
                ious[f"{rule}/fixed head"], chosen[rule] = fixed_head(scores, self.seed)
            ious[f"{rule}/mean"] = scores.mean
            ious[f"{rule}/oracle head"] = oracle_head(scores)
        return Result(name, ious, {"fixed heads": chosen})


def iou_table(results: list[Result], *, mass: float) -> str:
    """The mean IoUs with their 95 % intervals, one row per rule, one column per network."""
    networks = [result for result in results if result.name in (NETWORK, RANDOM)]
    count = len(networks[0].ious["mass/mean"])
    lines = [_row(f"IoU of {count} pictures, ± 95 % interval", [network.name for network in networks])]
    rules = {"mass": f"masks with {mass:.0%} of the attention", "area": "masks as large as the object, which is given"}
    for rule, title in rules.items():
        lines.append(title)
        for head, name in HEAD_RULES.items():
            if f"{rule}/{head}" in networks[0].ious:
                lines.append(_row(f"  {name}", [_cell(network.ious[f"{rule}/{head}"]) for network in networks]))
    lines.append("without a network")
    lines += [_row(f"  {BASELINES[r.name]}", [_cell(r.ious["IoU"])]) for r in results if r.name in BASELINES]
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<44}" + "".join(f"{cell:>16}" for cell in cells)


def _cell(values: Tensor) -> str:
    metric = _mean("", values)
    return f"{metric.value:.3f} ± {(metric.high - metric.low) / 2:.3f}"


def _mean(name: str, values: Tensor) -> Metric:
    """The mean of per-picture values (n,), with the normal 95 % interval over pictures; one picture has none."""
    n, mean = len(values), values.mean().item()
    half = 1.959964 * values.std().item() / n**0.5 if n > 1 else 1.0
    return Metric(name, mean, n, max(0.0, mean - half), min(1.0, mean + half), interval="normal, over pictures")
