"""What is in an image folder: kinds, sizes, classes, unreadable files, duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_vit.data.dataset import UnreadableImageError, escape_path
from ssl_vit.data.sources.decode import open_image, orientation, to_tensor
from ssl_vit.data.sources.image_folder import SPLITS, ImageFolder, counts
from ssl_vit.runtime.workers import map_threads

_SHOWN = 8  # names per list on the terminal
_PERCENTILES = (0, 5, 50, 95, 100)


class ImageInfo(NamedTuple):
    """Of one image that can be read."""

    format: str
    mode: str
    width: int  # pixels, upright
    height: int
    rotated: bool  # by its EXIF orientation


class Scanned(NamedTuple):
    """One file."""

    name: str
    bytes: int
    digest: str  # of the content
    facts: ImageInfo | UnreadableImageError


@dataclass(frozen=True)
class DatasetSummary:
    """What `summarize_dataset` found."""

    root: str
    dataset: int
    bytes: int
    memory_bytes: int  # of all readable images as RGB, uint8
    extensions: dict[str, int]
    formats: dict[str, int]
    modes: dict[str, int]
    short_side: dict[str, int]  # percentile -> pixels
    long_side: dict[str, int]
    rotated: list[str]
    classes: dict[str, dict[str, int]]  # images per class folder, in each of train/, val/, test/, or under ""
    unreadable: dict[str, str]  # name -> reason
    duplicates: list[list[str]]  # groups of files with equal content
    leaks: list[list[str]]  # those of them that lie in train/ and in val/ or test/ too
    ignored: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Everything, in plain containers."""
        return asdict(self)

    def as_text(self) -> str:
        """The report for a terminal; long lists of names are cut."""
        lines = [
            f"{self.root}: {self.dataset:,} images, {_bytes(self.bytes)} on disk, "
            f"{_bytes(self.memory_bytes)} as RGB in memory",
            "",
        ]
        rows = {
            "extensions": _counted(self.extensions),
            "formats": _counted(self.formats),
            "modes": _counted(self.modes),
            "short side": _range(self.short_side),
            "long side": _range(self.long_side),
            "rotated": f"{len(self.rotated):,} by their EXIF orientation" if self.rotated else "",
            **{f"classes {split}".strip(): _spread(classes) for split, classes in self.classes.items()},
            "ignored": _counted(self.ignored),
        }
        lines += [f"  {name:<14}{text}" for name, text in rows.items() if text]
        lines.append("")
        lines += self._troubles() or ["  Every image can be read, and no two files are the same."]
        return "\n".join(lines)

    def _troubles(self) -> list[str]:
        lines = []
        if self.unreadable:
            lines.append(f"  {len(self.unreadable):,} cannot be read and will be skipped:")
            lines += _cut([f"{name}: {reason}" for name, reason in self.unreadable.items()])
        if self.duplicates:
            extra = sum(map(len, self.duplicates)) - len(self.duplicates)
            lines.append(f"  {extra:,} are exact copies of another:")
            lines += _cut([" = ".join(names) for names in self.duplicates])
        if self.leaks:
            lines.append(f"  {len(self.leaks):,} in train/ stand in val/ or test/ again, which flatters every result:")
            lines += _cut([" = ".join(names) for names in self.leaks])
        return lines


def summarize_dataset(dataset: ImageFolder) -> DatasetSummary:
    """Read every file once, whole, and report."""
    every = list(map_threads(lambda i: _scan(dataset, i), len(dataset), label="scanning", show=True))
    good = {one.name: one.facts for one in every if isinstance(one.facts, ImageInfo)}
    groups = defaultdict(list)
    for one in every:
        if one.bytes:
            groups[one.digest].append(one.name)
    duplicates = sorted(names for names in groups.values() if len(names) > 1)
    return DatasetSummary(
        root=escape_path(dataset.root),
        dataset=len(dataset),
        bytes=sum(one.bytes for one in every),
        memory_bytes=sum(facts.width * facts.height * 3 for facts in good.values()),
        extensions=_by_count(dataset.extensions),
        formats=_by_count(Counter(facts.format for facts in good.values())),
        modes=_by_count(Counter(facts.mode for facts in good.values())),
        short_side=_percentiles(min(facts.width, facts.height) for facts in good.values()),
        long_side=_percentiles(max(facts.width, facts.height) for facts in good.values()),
        rotated=[name for name, facts in good.items() if facts.rotated],
        classes=_class_counts([one.name for one in every]),
        unreadable={one.name: one.facts.reason for one in every if isinstance(one.facts, UnreadableImageError)},
        duplicates=duplicates,
        leaks=[names for names in duplicates if _leaks(names)],
        ignored=_by_count(dataset.ignored),
    )


def _scan(dataset: ImageFolder, index: int) -> Scanned:
    name, path = dataset.name(index), dataset.path(index)
    try:
        content = path.read_bytes()
    except OSError as error:
        return Scanned(name, 0, "", UnreadableImageError(name, error.strerror or str(error)))
    digest = hashlib.sha256(content).hexdigest()
    return Scanned(name, len(content), digest, _facts(path))


def _facts(path: Path) -> ImageInfo | UnreadableImageError:
    try:
        with open_image(path) as image:
            kind, mode, rotated = image.format or "", image.mode, orientation(image) != 1
            height, width = to_tensor(image, channels=3).shape[1:]
    except UnreadableImageError as broken:
        return broken
    return ImageInfo(kind, mode, width, height, rotated)


def _class_counts(names: list[str]) -> dict[str, dict[str, int]]:
    """Images per class folder: {"": {class: count}}, or for each of train/, val/, test/; empty without them."""
    folders = [name.split("/")[:-1] for name in names]
    if not all(folders):
        return {}
    if not SPLITS.issuperset(first for first, *_ in folders):
        return {"": dict(sorted(Counter(first for first, *_ in folders).items()))}
    per_split: dict[str, Counter[str]] = defaultdict(Counter)
    for split, *rest in folders:
        if rest:
            per_split[split][rest[0]] += 1
    return {split: dict(sorted(classes.items())) for split, classes in per_split.items()}


def _leaks(names: list[str]) -> bool:
    splits = {name.partition("/")[0] for name in names}
    return "train" in splits and bool(splits & {"val", "test"})


def _percentiles(sides: Iterable[int]) -> dict[str, int]:
    values = list(sides)
    return {str(share): round(np.percentile(values, share)) for share in _PERCENTILES} if values else {}


def _range(percentiles: dict[str, int]) -> str:
    """`156 to 1,024 pixels, median 375, nine tenths within 240 to 513`."""
    if not percentiles:
        return ""
    least, low, median, high, most = percentiles.values()
    if least == most:
        return f"{most:,} pixels"
    return f"{least:,} to {most:,} pixels, median {median:,}, nine tenths within {low:,} to {high:,}"


def _by_count(kinds: Counter[str]) -> dict[str, int]:
    return dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def _counted(kinds: dict[str, int]) -> str:
    return counts(Counter(kinds))


def _spread(classes: dict[str, int]) -> str:
    """`10, from 480 (bird) to 500 (cat) images`."""
    fewest, most = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    if classes[fewest] == classes[most]:
        return f"{len(classes):,}, of {classes[most]:,} images each"
    return f"{len(classes):,}, from {classes[fewest]:,} ({fewest}) to {classes[most]:,} ({most}) images"


def _cut(lines: list[str]) -> list[str]:
    more = [f"... and {len(lines) - _SHOWN:,} more; out=FOLDER writes all names"] if len(lines) > _SHOWN else []
    return [f"    {line}" for line in lines[:_SHOWN] + more]


def _bytes(count: int) -> str:
    """`3.2 GB`, in powers of 1000."""
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
