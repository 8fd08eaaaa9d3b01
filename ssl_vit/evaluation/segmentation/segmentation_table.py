"""The scores of `ssl-vit attention` on the terminal: a row per rule or method, a column per measure."""

from __future__ import annotations

from torch import Tensor

from ssl_vit.evaluation.segmentation.segmentation_evaluator import (
    BY_OBJECT,
    CORLOC,
    MEASURES,
    RANDOM,
    MethodResult,
    mean,
)

HEAD_RULES = {
    "fixed head": "best fixed head",
    "mean": "mean of the heads",
    "oracle head": "oracle: each image's best",
}
OBJECTS = "attention: each object by itself"
OBJECT_RULES = HEAD_RULES | {"oracle head": "oracle: each object's best"}
BASELINES = {
    "center prior": "center prior: the average mask",
    "all foreground": "the whole image",
    "patch ceiling": "ceiling: patches' majority",
}
_NAME, _IOU, _RANDOM = 32, 14, 12  # widths of columns; a measure's is that of its name


def score_table(results: list[MethodResult], *, mass: float) -> str:
    """The model's means, the IoU (CorLoc where only boxes are given) of its random-init model, and the baselines."""
    model = results[0]
    twin = next((result for result in results if result.name == RANDOM), None)
    count = len(next(iter(model.values.values())))
    if not model.ious:
        return _located(results, count)
    lines = [_row(f"IoU of {count} images", "± 95 %", list(MEASURES), RANDOM if twin else "")]
    sections = {
        f"attention: masks with {mass:.0%} of it": {f"mass/{rule}": name for rule, name in HEAD_RULES.items()},
        OBJECTS: {f"object/{rule}": name for rule, name in OBJECT_RULES.items()},
        "attention: the object's area, given": {f"area/{rule}": name for rule, name in HEAD_RULES.items()},
        "other methods": {rule: rule for rule in model.ious if "/" not in rule},
    }
    for title, rules in sections.items():
        shown = {rule: name for rule, name in rules.items() if rule in model.ious}
        if shown:
            lines.append(title)
            lines += [_rule(f"  {name}", rule, model, twin) for rule, name in shown.items()]
        if shown and title == OBJECTS:
            lines += [
                _row(f"  {BASELINES[result.name]}", _cell(result.others[BY_OBJECT]), [], "")
                for result in results
                if BY_OBJECT in result.others
            ]
    lines.append("without a model")
    lines += [_rule(f"  {BASELINES[result.name]}", "", result, None) for result in results if result.name in BASELINES]
    if count == 1:
        lines.append("one image: no intervals, no fixed head and no center prior, which take others")
    return "\n".join(lines)


def _rule(name: str, rule: str, result: MethodResult, twin: MethodResult | None) -> str:
    cells = [
        _share(result.others[key]) if (key := f"{rule} {measure}".strip()) in result.others else ""
        for measure in MEASURES
    ]
    return _row(name, _cell(result.ious[rule or "IoU"]), cells, _share(twin.ious[rule]) if twin else "")


def _located(results: list[MethodResult], count: int) -> str:
    """CorLoc alone."""
    lines = [_row(f"{CORLOC} of {count} images", "± 95 %", [], "")]
    for result in results:
        title = BASELINES.get(result.name, result.name)
        for name, values in result.others.items():
            lines.append(_row(f"{title} {name.removesuffix(CORLOC)}".strip(), _cell(values), [], ""))
    return "\n".join(lines)


def _row(name: str, iou: str, cells: list[str], random: str) -> str:
    measures = "".join(f"{cell:>{max(5, len(title)) + 1}}" for title, cell in zip(MEASURES, cells, strict=False))
    return f"{name:<{_NAME}}{iou:>{_IOU}}{measures}{random:>{_RANDOM}}".rstrip()


def _share(values: Tensor) -> str:
    return f"{values.double().mean().item():.3f}"


def _cell(values: Tensor) -> str:
    metric = mean("", values)
    return f"{metric.value:.3f}" + (f" ± {(metric.high - metric.low) / 2:.3f}" if metric.n > 1 else " ±   -  ")
