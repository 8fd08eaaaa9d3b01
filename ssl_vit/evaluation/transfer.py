"""Transfer between datasets: models pretrained on one dataset, linear probes on others, as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.text import Bold, format_table


class TransferResult(NamedTuple):
    """Accuracy of a linear probe on one model and dataset."""

    value: float  # accuracy in [0, 1]
    low: float  # 95 % interval
    high: float
    n: int  # test images
    split: str
    warnings: list[str]
    in_domain: bool  # whether the model was pretrained on these images

    @classmethod
    def from_json(cls, result: Mapping[str, Any], *, in_domain: bool) -> TransferResult:
        """Read the JSON of a linear probe's result."""
        metric = result["score"]["metrics"][0]
        split, warnings = result["protocol"]["split"], result["warnings"]
        return cls(metric["value"], metric["low"], metric["high"], metric["n"], split, warnings, in_domain)

    def label(self) -> str:
        """Return the accuracy and its interval in percent, in bold if in-domain."""
        text = f"{100 * self.value:.1f} ± {50 * (self.high - self.low):.1f}"
        return Bold(text) if self.in_domain else text


def transfer_table(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], TransferResult]) -> str:
    """Return a Markdown table with a row per model, a column per dataset, a dash for missing cells, and notes below."""
    headers, notes = ["accuracy in %"], []
    for column in columns:
        results = [cell for (_, data), cell in cells.items() if data == column]
        counts = " or ".join(f"{n:,}" for n in sorted({cell.n for cell in results}))
        headers.append(f"{column} (n = {counts})" if counts else column)
        notes += [f"{column}: {split}." for split in sorted({cell.split for cell in results} - {"train and test"})]
    labels = {names: cell.label() for names, cell in cells.items()}
    lines = [[row, *(labels.get((row, column), "–") for column in columns)] for row in rows]
    text = [format_table(lines, headers, style="markdown"), ""]
    text.append("Linear probes on frozen features; ± is half of the 95 % interval over test images.")
    if any(cell.in_domain for cell in cells.values()):
        text.append("**bold**: images that the model was pretrained on, without their labels.")
    text += notes
    text += [f"warning: {row} on {data}: {text}" for (row, data), cell in cells.items() for text in cell.warnings]
    return "\n".join(text)


def short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Return names for files and tables: as many last parts of each path as distinguish all of them.

    Example:
        >>> short_names([("runs", "a"), ("runs", "b")]), short_names([("x", "a"), ("y", "a")])
        (['a', 'b'], ['x-a', 'y-a'])

    Raises:
        UserError: Two are equal.
    """
    names: list[str] = []
    for depth in range(1, max(map(len, paths)) + 1):
        names = [re.sub(r"[^\w.+-]+", "-", "-".join(parts[-depth:])) for parts in paths]
        if len(set(names)) == len(names):
            return names
    duplicate = next(name for name in names if names.count(name) > 1)
    raise UserError(f"{duplicate} occurs twice (or two names differ in punctuation only); use each once")


def pretraining_images(run: Path | None) -> tuple[str, Path] | None:
    """Return source and root of the images in a run's `config.yaml`; None if unknown."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if run else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or not {"source", "root"} <= data.keys():
        return None
    return str(data["source"]), Path(str(data["root"])).resolve()
