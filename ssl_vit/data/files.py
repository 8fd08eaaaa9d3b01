"""Picture files: found below a folder or named in a list, read when asked for."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.data.decode import EXTENSIONS, decode
from ssl_vit.data.index import find_below
from ssl_vit.data.names import Names
from ssl_vit.data.pictures import BrokenPicture, Shrink, printable
from ssl_vit.errors import UserError

SPLITS = frozenset({"train", "val", "test"})  # folders of these names are parts of a data set, not classes


class FilePictures:
    """Pictures in files; the class folders directly below the root, if all pictures are in some, are their labels.

    Args:
        root: What the names are relative to.
        names: One path per picture; sorted, if class folders are labels.
        ignored: How many files of which kind were found beside the pictures.
        labelled: Whether class folders are labels.
    """

    def __init__(self, root: Path, names: Names, *, ignored: Counter[str], labelled: bool) -> None:
        self.root = root
        self.names = names
        self.ignored = ignored
        self.labels, self.classes = class_folders(names) if labelled else unlabelled(len(names))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The picture's file."""
        return self.root / os.fsdecode(self.names[index])

    def name(self, index: int) -> str:
        """The file's path relative to the root, printable."""
        return printable(self.names[index])

    def read(self, index: int, channels: int, shrink: Shrink | None = None) -> Tensor:
        """The picture as (C, H, W) uint8, a JPEG smaller where `shrink` allows.

        Raises:
            BrokenPicture: It cannot be read.
        """
        try:
            return decode(self.path(index), channels, shrink)
        except BrokenPicture as broken:
            raise BrokenPicture(self.name(index), broken.reason) from broken

    def content(self, index: int) -> bytes:
        """The file's bytes.

        Raises:
            BrokenPicture: It cannot be read.
        """
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise BrokenPicture(self.name(index), error.strerror or str(error)) from error

    def with_names(self, names: Names) -> FilePictures:
        """Other pictures below the same root."""
        return FilePictures(self.root, names, ignored=self.ignored, labelled=bool(self.classes))

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
        """How many pictures have which extension."""
        kinds: Counter[str] = Counter()
        for suffix, count in Counter(os.path.splitext(name)[1].lower() for name in self.names).items():  # noqa: PTH122
            kinds[printable(suffix) or "without extension"] += count
        return kinds

    def describe(self) -> str:
        """Counts per extension, and of what was ignored."""
        text = f"{len(self):,} pictures in {printable(self.root)} ({counts(self.extensions)})"
        return f"{text}; ignored: {counts(self.ignored)}" if self.ignored else text


def folder_pictures(root: Path) -> FilePictures:
    """All pictures below a folder, sorted by path.

    Raises:
        UserError: There is no such folder, or no picture in it.
    """
    if not root.is_dir():
        problem = "is a file, not a folder (a list of paths is data.source=list)" if root.exists() else "does not exist"
        raise UserError(f"{printable(root.absolute())} {problem}; name the folder that holds the pictures")
    names, ignored = find_below(root)
    if not len(names):
        found = f"it holds {counts(ignored)}" if ignored else "it is empty"
        hint = "data.source=shards reads tar files" if ignored[".tar"] else f"pictures: {', '.join(sorted(EXTENSIONS))}"
        raise UserError(f"{printable(root.absolute())}: there is no picture in this folder, {found}; {hint}")
    return FilePictures(root, names, ignored=ignored, labelled=True)


def pictures_at(place: Path) -> FilePictures:
    """The one picture that is named, without a label, or all pictures below a folder.

    Raises:
        UserError: There is neither, or no picture in the folder.
    """
    if place.is_file():
        return FilePictures(place.parent, Names.pack([os.fsencode(place.name)]), ignored=Counter(), labelled=False)
    return folder_pictures(place)


def listed_pictures(file: Path) -> FilePictures:
    """The pictures of a text file with one path a line, absolute or relative to the file's folder, in its order.

    Raises:
        UserError: There is no such file, or no path in it.
    """
    if not file.is_file():
        problem = "is a folder (use data.source=folder)" if file.is_dir() else "does not exist"
        raise UserError(f"{printable(file.absolute())} {problem}; data.source=list wants a text file, one path a line")
    with file.open("rb") as content:
        names = Names.pack(path for line in content for path in line.splitlines() if path.strip())
    if not len(names):
        raise UserError(f"{printable(file.absolute())}: there is no path in this list")
    return FilePictures(file.parent, names, ignored=Counter(), labelled=False)


def class_folders(names: Names) -> tuple[Tensor, list[str]]:
    """Labels (N,) and class names from the first folder of each path; none when a picture lies outside of such folders.

    `train`, `val` and `test` are no classes.

    Args:
        names: Sorted, so that the pictures of a class folder stand side by side.
    """
    sizes: dict[bytes, int] = {}  # pictures per folder
    start = 0
    while start < len(names):
        folder, slash, _ = names[start].partition(b"/")
        if not slash:
            return unlabelled(len(names))
        end = bisect_left(names, folder + b"0", lo=start + 1)  # 0 is next after /
        sizes[folder], start = end - start, end
    classes = sorted(sizes, key=os.fsdecode)
    if SPLITS.issuperset(map(os.fsdecode, classes)):
        return unlabelled(len(names))
    place = {folder: label for label, folder in enumerate(classes)}
    labels = torch.tensor([place[folder] for folder in sizes])
    return labels.repeat_interleave(torch.tensor([*sizes.values()])), [printable(folder) for folder in classes]


def unlabelled(count: int) -> tuple[Tensor, list[str]]:
    """Labels (N,) all -1, and no class."""
    return torch.full((count,), -1), []


def counts(kinds: Counter[str], most: int = 8) -> str:
    """`12 .txt, 3 .pdf`: the most frequent kinds first."""
    listed = [f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    rest = [f"{len(listed) - most} more kinds"] if len(listed) > most else []
    return ", ".join(listed[:most] + rest)
