"""Summarize an image folder: formats, sizes, classes, unreadable files, exact duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ssl_vit.data.dataset import UnreadableImageError, escape_path
from ssl_vit.data.sources.decode import open_image, orientation
from ssl_vit.data.sources.image_folder import ImageFolder, format_counts, sort_counts
from ssl_vit.data.sources.split_folders import split_role
from ssl_vit.data.value_notes import decode_with_remarks, format_remarks
from ssl_vit.runtime.text import pluralize, truncate_list
from ssl_vit.runtime.workers import map_threads

_SHOWN = 8  # names per list on the terminal
_PERCENTILES = (0, 5, 50, 95, 100)


class FileInfo(NamedTuple):
    """One scanned file and, if `reason` is empty, the properties of its image."""

    name: str
    bytes: int
    digest: str  # of the content; empty if it cannot be read
    reason: str  # why it cannot be read
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = 0, 0  # height and width in pixels, upright
    rotated: bool = False  # by its EXIF orientation
    remarks: tuple[str, ...] = ()  # on how its values are decoded


class DatasetSummary(NamedTuple):
    """The result of `summarize_dataset`."""

    root: str
    num_images: int
    bytes: int
    memory_bytes: int  # of all readable images as RGB, uint8
    extensions: dict[str, int]
    formats: dict[str, int]
    modes: dict[str, int]
    short_side: dict[str, int]  # percentile -> pixels
    long_side: dict[str, int]
    rotated: list[str]
    values: list[str]  # remarks on how values are decoded
    classes: dict[str, dict[str, int]]  # images per class folder, in each of train/, val/, test/, or under ""
    unreadable: dict[str, str]  # name -> reason
    duplicates: list[list[str]]  # groups of files with equal content
    leaks: list[list[str]]  # duplicates that are in train/ and in val/ or test/
    ignored: dict[str, int]

    def as_text(self) -> str:
        """Format the summary for a terminal; long lists of names are truncated."""
        rows = {
            "extensions": format_counts(self.extensions),
            "formats": format_counts(self.formats),
            "modes": format_counts(self.modes),
            "short side": _format_percentiles(self.short_side),
            "long side": _format_percentiles(self.long_side),
            "rotated": f"{len(self.rotated):,} by their EXIF orientation" if self.rotated else "",
            **{f"classes {split}".strip(): _format_classes(classes) for split, classes in self.classes.items()},
            "ignored": format_counts(self.ignored),
        }
        unreadable = [f"{name}: {reason}" for name, reason in self.unreadable.items()]
        duplicates, leaks = ([" = ".join(names) for names in groups] for groups in (self.duplicates, self.leaks))
        copies = sum(map(len, self.duplicates)) - len(self.duplicates)
        problems = {
            f"{len(unreadable):,} cannot be read and will be skipped:": unreadable,
            f"{pluralize(copies, 'exact duplicate')} of other images:": duplicates,
            f"{len(leaks):,} of train/ also in val/ or test/, which makes results look too good:": leaks,
        }
        lines = [
            f"{self.root}: {pluralize(self.num_images, 'image')}, {_format_bytes(self.bytes)} on disk, "
            f"{_format_bytes(self.memory_bytes)} as RGB in memory",
            "",
            *(f"  {name:<14}{text}" for name, text in rows.items() if text),
            "",
        ]
        for title, names in problems.items():
            if names:
                shown = truncate_list(names, _SHOWN, hint="; out=FOLDER writes all names")
                lines += [f"  {title}", *(f"    {line}" for line in shown)]
        lines += [f"  {remark}" for remark in self.values]
        if not any(problems.values()):
            lines.append("  All images can be read, and there are no exact duplicates.")
        return "\n".join(lines)


def summarize_dataset(dataset: ImageFolder) -> DatasetSummary:
    """Read every file once and summarize them."""
    files = list(map_threads(lambda i: _scan_file(dataset, i), len(dataset), label="scanning", show=True))
    images = [file for file in files if not file.reason]
    sides = np.array([image.size for image in images], dtype=np.int64).reshape(-1, 2)
    groups = defaultdict(list)
    for file in files:
        if file.bytes:
            groups[file.digest].append(file.name)
    duplicates = sorted(names for names in groups.values() if len(names) > 1)
    return DatasetSummary(
        root=escape_path(dataset.root),
        num_images=len(dataset),
        bytes=sum(file.bytes for file in files),
        memory_bytes=3 * int(sides.prod(axis=1).sum()),
        extensions=sort_counts(dataset.extensions),
        formats=sort_counts(Counter(image.format for image in images)),
        modes=sort_counts(Counter(image.mode for image in images)),
        short_side=_percentiles(sides.min(axis=1)),
        long_side=_percentiles(sides.max(axis=1)),
        rotated=[image.name for image in images if image.rotated],
        values=format_remarks(((image.name, image.remarks) for image in images), f"{len(images):,} readable images"),
        classes=_class_counts([file.name for file in files]),
        unreadable={file.name: file.reason for file in files if file.reason},
        duplicates=duplicates,
        leaks=[names for names in duplicates if _is_leak(names)],
        ignored=sort_counts(dataset.ignored),
    )


def _scan_file(dataset: ImageFolder, index: int) -> FileInfo:
    name, content, digest = dataset.name(index), b"", ""
    try:
        content = dataset.content(index)
        digest = hashlib.sha256(content).hexdigest()
        with open_image(dataset.path(index)) as image:
            kind, mode, rotated = image.format or "", image.mode, orientation(image) != 1
            pixels, remarks = decode_with_remarks(image, dataset.value_range)
            height, width = pixels.shape[1:]
    except UnreadableImageError as error:
        return FileInfo(name, len(content), digest, error.reason)
    return FileInfo(name, len(content), digest, "", kind, mode, (height, width), rotated, remarks)


def _class_counts(names: list[str]) -> dict[str, dict[str, int]]:
    """Count images per class folder: {"": {class: count}}, or for each of train/, val/, test/; empty without them."""
    folders = [name.split("/")[:-1] for name in names]
    if not all(folders):
        return {}
    if len({first for first, *_ in folders}) < 2 or not all(split_role(first) for first, *_ in folders):
        return {"": dict(sorted(Counter(first for first, *_ in folders).items()))}
    per_split: dict[str, Counter[str]] = defaultdict(Counter)
    for split, *rest in folders:
        if rest:
            per_split[split][rest[0]] += 1
    return {split: dict(sorted(classes.items())) for split, classes in per_split.items()}


def _is_leak(names: list[str]) -> bool:
    roles = {split_role(name.partition("/")[0]) for name in names if "/" in name}
    return "train" in roles and bool(roles & {"val", "test"})


def _percentiles(sides: npt.NDArray[np.int64]) -> dict[str, int]:
    return {str(percent): round(np.percentile(sides, percent)) for percent in _PERCENTILES} if len(sides) else {}


def _format_percentiles(percentiles: dict[str, int]) -> str:
    """Format as `156 to 1,024 pixels, median 375, 90 % within 240 to 513`."""
    if not percentiles:
        return ""
    least, low, median, high, most = percentiles.values()
    if least == most:
        return f"{most:,} pixels"
    return f"{least:,} to {most:,} pixels, median {median:,}, 90 % within {low:,} to {high:,}"


def _format_classes(classes: dict[str, int]) -> str:
    """Format as `10, from 480 (bird) to 500 (cat) images`."""
    fewest, most = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    if classes[fewest] == classes[most]:
        return f"{len(classes):,}, {pluralize(classes[most], 'image')} each"
    return f"{len(classes):,}, from {classes[fewest]:,} ({fewest}) to {classes[most]:,} ({most}) images"


def _format_bytes(count: int) -> str:
    """Format as `3.2 GB`, in powers of 1000."""
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
