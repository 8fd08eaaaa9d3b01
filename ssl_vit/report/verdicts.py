"""What a run wrote down about its own health."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ssl_vit.report.content import Verdict


class Journals(NamedTuple):
    """The verdicts, and how many lines of the journals could not be read."""

    verdicts: list[Verdict]
    damaged: int


def verdicts_of(folder: Path) -> Journals:
    """The verdicts of `health.jsonl`, and one more where steps were left out."""
    health, damaged = _lines(folder / "health.jsonl", ("name", "finding", "remedy"))
    verdicts = [Verdict(str(v["name"]), v["step"], str(v["finding"]), str(v["remedy"])) for v in health]
    skipped, more = _lines(folder / "skipped_steps.jsonl", ())
    if steps := sorted({entry["step"] for entry in skipped}):
        where = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
        count = "1 step was" if len(steps) == 1 else f"{len(steps):,} steps were"
        text = f"{count} left out, {where}: the loss or a gradient was not finite"
        remedy = "skipped_steps.jsonl names their pictures; a lower method.optimizer.lr or trainer.precision=32-true"
        verdicts.append(Verdict("skipped-steps", steps[0], text, f"{remedy} may help."))
    return Journals(verdicts, damaged + more)


def _lines(path: Path, keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], int]:
    """The entries that hold a step and these keys, and how many lines do not."""
    if not path.is_file():
        return [], 0
    entries, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int) or any(key not in entry for key in keys):
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged += 1
            continue
        entries.append(entry)
    return entries, damaged
