"""Small helpers for the text of messages and summaries."""

from __future__ import annotations


def pluralize(count: int, noun: str, plural: str | None = None) -> str:
    """Return the count with its noun in singular or plural: `1 image`, `2,000 images`, `3 classes` (with `plural`)."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def truncate_list(lines: list[str], limit: int, hint: str = "") -> list[str]:
    """Return the first `limit` lines and, if there are more, their number with a hint: `... and 3 more`."""
    more = [f"... and {len(lines) - limit:,} more{hint}"] if len(lines) > limit else []
    return [*lines[:limit], *more]
