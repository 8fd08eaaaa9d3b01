"""Image files: found below a folder or named in a list, read when asked for."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.data.dataset import JPEGScaleFn, UnreadableImageError, escape_path
from ssl_vit.data.sources.decode import EXTENSIONS, decode
from ssl_vit.data.sources.image_index import cached_walk
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.runtime.errors import UserError

SPLITS = frozenset({"train", "val", "test"})  # folders of these names are parts of a data set, not classes


class ImageFolder:
    """Images in files; the class folders directly below the root, if all images are in some, are their labels.

    Args:
        root: What the names are relative to.
        names: One path per image; sorted, if class folders are labels.
        ignored: How many files of which kind were found beside the images.
        labeled: Whether class folders are labels.
    """

    def __init__(self, root: Path, names: PackedPaths, *, ignored: Counter[str], labeled: bool) -> None:
        self.root = root
        self.names = names
        self.ignored = ignored
        self.labels, self.classes = labels_from_folders(names) if labeled else unlabeled(len(names))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The image's file."""
        return self.root / os.fsdecode(self.names[index])

    def name(self, index: int) -> str:
        """The file's path relative to the root, printable."""
        return escape_path(self.names[index])

    def read(self, index: int, channels: int, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
        """The image as (C, H, W) uint8, a JPEG smaller where `jpeg_scale` allows.

        Raises:
            UnreadableImageError: It cannot be read.
        """
        try:
            return decode(self.path(index), channels, jpeg_scale)
        except UnreadableImageError as broken:
            raise UnreadableImageError(self.name(index), broken.reason) from broken

    def content(self, index: int) -> bytes:
        """The file's bytes.

        Raises:
            UnreadableImageError: It cannot be read.
        """
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise UnreadableImageError(self.name(index), error.strerror or str(error)) from error

    def with_names(self, names: PackedPaths) -> ImageFolder:
        """Other images below the same root."""
        return ImageFolder(self.root, names, ignored=self.ignored, labeled=bool(self.classes))

    def fingerprint(self, *, sizes: bool, times: bool = False) -> str:
        """A hash of all names, and of file sizes and times of change if wanted, for which each file is asked."""
        if not sizes and not times:
            return self.names.fingerprint()
        digest = hashlib.sha256()
        for name in self.names:
            try:
                about = os.stat(os.path.join(os.fsencode(self.root), name))  # noqa: PTH116, PTH118 - bytes
                size, changed = about.st_size, about.st_mtime_ns
            except OSError:
                size = changed = -1
            digest.update(b"%s\0%d\0" % (name, size))
            if times:
                digest.update(b"%d\0" % changed)
        return digest.hexdigest()

    @property
    def extensions(self) -> Counter[str]:
        """How many images have which extension."""
        kinds: Counter[str] = Counter()
        for suffix, count in Counter(os.path.splitext(name)[1].lower() for name in self.names).items():  # noqa: PTH122
            kinds[escape_path(suffix) or "without extension"] += count
        return kinds

    def describe(self) -> str:
        """Counts per extension, and of what was ignored."""
        text = f"{len(self):,} images in {escape_path(self.root)} ({counts(self.extensions)})"
        return f"{text}; ignored: {counts(self.ignored)}" if self.ignored else text


def scan_image_folder(root: Path) -> ImageFolder:
    """All images below a folder, sorted by path.

    Raises:
        UserError: There is no such folder, or no image in it.
    """
    if not root.is_dir():
        problem = "is a file, not a folder (a list of paths is data.source=list)" if root.exists() else "does not exist"
        raise UserError(f"{escape_path(root.absolute())} {problem}; name the folder that holds the images")
    names, ignored = cached_walk(root)
    if not len(names):
        found = f"it holds {counts(ignored)}" if ignored else "it is empty"
        hint = "data.source=shards reads tar files" if ignored[".tar"] else f"images: {', '.join(sorted(EXTENSIONS))}"
        raise UserError(f"{escape_path(root.absolute())}: there is no image in this folder, {found}; {hint}")
    return ImageFolder(root, names, ignored=ignored, labeled=True)


def load_images_at(place: Path) -> ImageFolder:
    """The one image that is named, without a label, or all images below a folder.

    Raises:
        UserError: There is neither, or no image in the folder.
    """
    if place.is_file():
        return ImageFolder(
            place.parent, PackedPaths.from_iterable([os.fsencode(place.name)]), ignored=Counter(), labeled=False
        )
    return scan_image_folder(place)


def read_image_list(file: Path) -> ImageFolder:
    """The images of a text file with one path a line, absolute or relative to the file's folder, in its order.

    Raises:
        UserError: There is no such file, or no path in it.
    """
    if not file.is_file():
        problem = "is a folder (use data.source=folder)" if file.is_dir() else "does not exist"
        raise UserError(
            f"{escape_path(file.absolute())} {problem}; data.source=list wants a text file, one path a line"
        )
    with file.open("rb") as content:
        names = PackedPaths.from_iterable(path for line in content for path in line.splitlines() if path.strip())
    if not len(names):
        raise UserError(f"{escape_path(file.absolute())}: there is no path in this list")
    return ImageFolder(file.parent, names, ignored=Counter(), labeled=False)


def labels_from_folders(names: PackedPaths) -> tuple[Tensor, list[str]]:
    """Labels (N,) and class names from the first folder of each path; none when an image lies outside of such folders.

    `train`, `val` and `test` are no classes.

    Args:
        names: Sorted, so that the images of a class folder stand side by side.
    """
    sizes: dict[bytes, int] = {}  # images per folder
    start = 0
    while start < len(names):
        folder, slash, _ = names[start].partition(b"/")
        if not slash:
            return unlabeled(len(names))
        end = bisect_left(names, folder + b"0", lo=start + 1)  # 0 is next after /
        sizes[folder], start = end - start, end
    classes = sorted(sizes, key=os.fsdecode)
    if SPLITS.issuperset(map(os.fsdecode, classes)):
        return unlabeled(len(names))
    place = {folder: label for label, folder in enumerate(classes)}
    labels = torch.tensor([place[folder] for folder in sizes])
    return labels.repeat_interleave(torch.tensor([*sizes.values()])), [escape_path(folder) for folder in classes]


def unlabeled(count: int) -> tuple[Tensor, list[str]]:
    """Labels (N,) all -1, and no class."""
    return torch.full((count,), -1), []


def counts(kinds: Counter[str], most: int = 8) -> str:
    """`12 .txt, 3 .pdf`: the most frequent kinds first."""
    listed = [f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    rest = [f"{len(listed) - most} more kinds"] if len(listed) > most else []
    return ", ".join(listed[:most] + rest)
