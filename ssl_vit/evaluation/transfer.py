"""The table of domain transfer: models pretrained on one dataset, probed on others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssl_vit.runtime.errors import UserError

OWN = "**bold**: images that the model was pretrained on, without their labels"


class TransferResult(NamedTuple):
    """What the record of one model on one data set says."""

    value: float  # accuracy in [0, 1]
    low: float  # ends of its 95 % interval
    high: float
    n: int  # test images
    split: str  # how training and test images were told apart
    warnings: list[str]
    own: bool  # the model was pretrained on these images

    @classmethod
    def of(cls, record: Mapping[str, Any], *, own: bool) -> TransferResult:
        """From a record of a linear probe, as it stands in its JSON file."""
        metric = record["score"]["metrics"][0]
        split, warnings = record["protocol"]["split"], record["warnings"]
        return cls(metric["value"], metric["low"], metric["high"], metric["n"], split, warnings, own)

    def __str__(self) -> str:
        text = f"{100 * self.value:.1f} ± {50 * (self.high - self.low):.1f}"
        return f"**{text}**" if self.own else text


def table(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], TransferResult]) -> str:
    """Markdown that is a table on a terminal, too: a row per model, a column per data set; a dash where none is."""
    heads = ["accuracy in %"]
    for column in columns:
        counts = {cell.n for (_, data), cell in cells.items() if data == column}
        heads.append(f"{column} (n = {' or '.join(f'{n:,}' for n in sorted(counts))})" if counts else column)
    lines = [[row, *(str(cells.get((row, column), "–")) for column in columns)] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    text = [_line(heads, widths), f"| {' | '.join(rule)} |", *(_line(line, widths) for line in lines), ""]
    text.append("Linear probes on frozen features; ± is half the 95 % interval for other test images.")
    if any(cell.own for cell in cells.values()):
        text.append(f"{OWN}.")
    for column in columns:
        splits = {cell.split for (_, data), cell in cells.items() if data == column} - {"train and test"}
        text += [f"{column}: {split}." for split in sorted(splits)]
    text += [f"warning: {row} on {data}: {text}" for (row, data), cell in cells.items() for text in cell.warnings]
    return "\n".join(text)


def short_names(places: Sequence[tuple[str, ...]]) -> list[str]:
    """Names for files and tables: of each path as many last parts as tell all of them apart.

    Example:
        >>> short_names([("runs", "a"), ("runs", "b")]), short_names([("x", "a"), ("y", "a")])
        (['a', 'b'], ['x-a', 'y-a'])

    Raises:
        UserError: Two are the same.
    """
    names: list[str] = []
    for depth in range(1, max(map(len, places)) + 1):
        names = [re.sub(r"[^\w.+-]+", "-", "-".join(parts[-depth:])) for parts in places]
        if len(set(names)) == len(names):
            return names
    same = next(name for name in names if names.count(name) > 1)
    raise UserError(f"{same} is named twice, or two names differ in signs only: name each once")


def pretrained_on(config: object) -> tuple[str, Path] | None:
    """Kind and place of the images that a run's `config.yaml` names; None if it names none."""
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or not {"source", "root"} <= data.keys():
        return None
    return str(data["source"]), Path(str(data["root"])).resolve()


def _line(values: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        value.rjust(width) if place else value.ljust(width)
        for place, (value, width) in enumerate(zip(values, widths, strict=True))
    )
    return f"| {' | '.join([first, *others])} |"
