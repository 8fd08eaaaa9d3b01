"""Small helpers for the text of messages and summaries."""

from __future__ import annotations


def pluralize(count: int, noun: str, plural: str | None = None) -> str:
    """Return the count with its noun in singular or plural: `1 image`, `2,000 images`, `3 classes` (with `plural`)."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
