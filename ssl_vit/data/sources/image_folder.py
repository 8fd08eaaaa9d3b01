"""Datasets of image files: all images below a folder, or the paths in a list file."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, JPEGScaleFn, UnreadableImageError, escape_path
from ssl_vit.data.sources.decode import decode, file_size
from ssl_vit.data.sources.file_kinds import EXTENSIONS
from ssl_vit.data.sources.image_index import REPEATED_FOLDER, cached_walk
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.data.sources.path_lists import read_paths
from ssl_vit.data.sources.split_folders import folder_layout
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.text import pluralize, truncate_list

log = logging.getLogger(__name__)


class ImageFolder(ImageDataset):
    """Image files with names relative to a root; `ignored` counts other files by kind.

    If `labeled`, names are sorted, and if all images are in folders directly below the root, these are the classes.
    """

    def __init__(
        self, root: Path, names: PackedPaths, *, ignored: Counter[str] | None = None, labeled: bool = False
    ) -> None:
        self.root = root
        self.names = names
        self.ignored = ignored or Counter()
        self.labels, self.classes = labels_from_folders(names) if labeled else unlabeled(len(names))

    def path(self, index: int) -> Path:
        """Return the path of the image file."""
        return self.root / os.fsdecode(self.names[index])

    def name(self, index: int) -> str:
        return escape_path(self.names[index])

    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        try:
            return decode(self.path(index), channels, jpeg_scale, self.value_range)
        except UnreadableImageError as error:
            raise UnreadableImageError(self.name(index), error.reason) from error

    def content(self, index: int) -> bytes:
        path = self.path(index)
        try:
            file_size(path)
            return path.read_bytes()
        except UnreadableImageError as error:
            raise UnreadableImageError(self.name(index), error.reason) from error
        except (OSError, ValueError) as error:  # ValueError: a list may have names that no file can have
            raise UnreadableImageError(self.name(index), getattr(error, "strerror", None) or str(error)) from error

    def with_names(self, names: PackedPaths) -> ImageFolder:
        """Return a dataset of other images below the same root."""
        dataset = ImageFolder(self.root, names, ignored=self.ignored, labeled=bool(self.classes))
        return dataset.with_range(self.value_range)

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        if not sizes and not times:
            return self.names.fingerprint()
        digest = hashlib.sha256()
        for name in self.names:
            try:
                status = os.stat(os.path.join(os.fsencode(self.root), name))  # noqa: PTH116, PTH118 - bytes
                size, changed = status.st_size, status.st_mtime_ns
            except OSError:
                size = changed = -1
            digest.update(b"%s\0%d\0" % (name, size))
            if times:
                digest.update(b"%d\0" % changed)
        return digest.hexdigest()

    @property
    def extensions(self) -> Counter[str]:
        """Number of images by extension."""
        kinds: Counter[str] = Counter()
        for suffix, count in Counter(os.path.splitext(name)[1].lower() for name in self.names).items():  # noqa: PTH122
            kinds[escape_path(suffix) or "without extension"] += count
        return kinds

    def describe(self) -> str:
        text = f"{pluralize(len(self), 'image')} in {escape_path(self.root)} ({format_counts(self.extensions)})"
        return f"{text}; ignored: {format_counts(self.ignored)}" if self.ignored else text


def scan_image_folder(root: Path) -> ImageFolder:
    """Build the dataset of all images below a folder, sorted by path.

    Raises:
        UserError: The folder does not exist or has no image.
    """
    if not root.is_dir():
        problem = "is a file, not a folder (a list of paths is data.source=list)" if root.exists() else "does not exist"
        raise UserError(f"{escape_path(root.absolute())} {problem}; name the folder that holds the images")
    names, ignored = cached_walk(root)
    if not len(names):
        found = f"it holds {format_counts(ignored)}" if ignored else "it is empty"
        hint = "data.source=shards reads tar files" if ignored[".tar"] else f"images: {', '.join(sorted(EXTENSIONS))}"
        raise UserError(f"{escape_path(root.absolute())}: there is no image in this folder, {found}; {hint}")
    if repeated := ignored[REPEATED_FOLDER]:
        log.warning(f"{escape_path(root)}: {pluralize(repeated, 'link')} to a folder that is there already, used once")
    return ImageFolder(root, names, ignored=ignored, labeled=True)


def load_images_at(path: Path) -> ImageFolder:
    """Build the dataset of one image file, without a label, or of all images below a folder.

    Raises:
        UserError: The path does not exist, or the folder has no image.
    """
    if path.is_file():
        names = PackedPaths.from_iterable([os.fsencode(path.name)])
        return ImageFolder(path.parent, names)
    if not path.exists():
        raise UserError(f"{escape_path(path.absolute())} does not exist; name an image, or a folder of images")
    return scan_image_folder(path)


def read_image_list(file: Path) -> ImageFolder:
    """Build the dataset of a text file with one path per line, absolute or relative to the file's folder.

    Raises:
        UserError: The file does not exist or has no path.
    """
    if not file.is_file():
        problem = "is a folder (use data.source=folder)" if file.is_dir() else "does not exist"
        raise UserError(
            f"{escape_path(file.absolute())} {problem}; data.source=list expects a text file with one path per line"
        )
    return ImageFolder(file.parent, PackedPaths.from_iterable(read_paths(file)))


def labels_from_folders(names: PackedPaths) -> tuple[Tensor, list[str]]:
    """Return labels (N,) and class names from the first folder of sorted paths; none if an image is not in a folder.

    Splits have no labels; see `folder_layout`.
    """
    sizes = count_by_folder(names)
    if not sizes:
        return unlabeled(len(names))
    class_of = {folder: _class_name(folder) for folder in sizes}
    classes = sorted(set(class_of.values()))
    if len(classes) < len(sizes):
        counts = Counter(class_of.values())
        same = [escape_path(folder) for folder, name in class_of.items() if counts[name] > 1]
        log.warning(f"folders that differ in blanks or Unicode form only are one class: {truncate_list(same, 8)}")
    if split_folders(names):
        return unlabeled(len(names))
    label_of = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([label_of[class_of[folder]] for folder in sizes])
    return labels.repeat_interleave(torch.tensor([*sizes.values()])), [escape_path(name) for name in classes]


def split_folders(names: PackedPaths) -> list[str]:
    """Return the names of the folders directly below the root if they are splits; see `folder_layout`."""

    def subfolders(folder: str) -> list[str]:
        return [os.fsdecode(path) for path in count_by_folder(names, os.fsencode(folder) + b"/")]

    folders = [os.fsdecode(folder) for folder in count_by_folder(names)]
    return folders if folder_layout(folders, subfolders).kind == "splits" else []


def _class_name(folder: bytes) -> str:
    """Return a folder's name in composed Unicode characters without blanks around it, as other systems may store it."""
    name = os.fsdecode(folder)
    return unicodedata.normalize("NFC", name).strip() or name


def count_by_folder(names: PackedPaths, prefix: bytes = b"") -> dict[bytes, int]:
    """Count the images, sorted, in each folder directly below a prefix such as `train/`; empty if one is in none."""
    sizes: dict[bytes, int] = {}
    start = bisect_left(names, prefix)
    stop = bisect_left(names, prefix[:-1] + b"0", lo=start) if prefix else len(names)  # 0 is next after /
    while start < stop:
        folder, slash, _ = names[start][len(prefix) :].partition(b"/")
        if not slash:
            return {}
        end = bisect_left(names, prefix + folder + b"0", lo=start + 1)
        sizes[folder], start = end - start, end
    return sizes


def unlabeled(count: int) -> tuple[Tensor, list[str]]:
    """Return labels (N,) of -1 and no class names."""
    return torch.full((count,), -1), []


def sort_counts(kinds: Mapping[str, int]) -> dict[str, int]:
    """Sort kinds by count, descending, then by name."""
    return dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def format_counts(kinds: Mapping[str, int], limit: int = 8) -> str:
    """Format as `12 .txt, 3 .pdf`, the most frequent kinds first."""
    entries = [f"{count:,} {kind}" for kind, count in sort_counts(kinds).items()]
    rest = [f"{len(entries) - limit} more kinds"] if len(entries) > limit else []
    return ", ".join(entries[:limit] + rest)
