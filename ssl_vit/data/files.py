"""Picture files: found below a folder or named in a list, read when asked for."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.data.decode import EXTENSIONS, decode
from ssl_vit.data.names import Names
from ssl_vit.data.pictures import BrokenPicture, printable
from ssl_vit.errors import UserError

SPLITS = frozenset({"train", "val", "test"})  # folders of these names are parts of a data set, not classes


class FilePictures:
    """Pictures in files; the class folders directly below the root, if all pictures are in some, are their labels.

    Args:
        root: What the names are relative to.
        names: One path per picture.
        ignored: How many files of which kind were found beside the pictures.
        labelled: Whether class folders are labels.
    """

    def __init__(self, root: Path, names: list[bytes], *, ignored: Counter[str], labelled: bool) -> None:
        self.root = root
        self.ignored = ignored
        self.extensions = Counter(extension(name) for name in names)
        self.labels, self.classes = class_folders(names) if labelled else unlabelled(len(names))
        self.names = Names.pack(names)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The picture's file."""
        return self.root / os.fsdecode(self.names[index])

    def name(self, index: int) -> str:
        """The file's path relative to the root, printable."""
        return printable(self.names[index])

    def read(self, index: int, channels: int) -> Tensor:
        """The picture as (C, H, W) uint8.

        Raises:
            BrokenPicture: It cannot be read.
        """
        try:
            return decode(self.path(index), channels)
        except BrokenPicture as broken:
            raise BrokenPicture(self.name(index), broken.reason) from broken

    def with_names(self, names: Names) -> FilePictures:
        """Other pictures below the same root."""
        return FilePictures(self.root, list(names), ignored=self.ignored, labelled=bool(self.classes))

    def fingerprint(self, *, sizes: bool) -> str:
        """A hash of all names, and of the files' sizes."""
        if not sizes:
            return self.names.fingerprint()
        digest = hashlib.sha256()
        for index in range(len(self)):
            path = self.path(index)
            size = path.stat().st_size if path.exists() else -1
            digest.update(b"%s\0%d\0" % (self.names[index], size))
        return digest.hexdigest()

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
    names, ignored = walk(root)
    if not names:
        found = f"it holds {counts(ignored)}" if ignored else "it is empty"
        known = ", ".join(sorted(EXTENSIONS))
        raise UserError(f"{printable(root.absolute())}: there is no picture in this folder, {found}; pictures: {known}")
    return FilePictures(root, names, ignored=ignored, labelled=True)


def listed_pictures(file: Path) -> FilePictures:
    """The pictures of a text file with one path a line, absolute or relative to the file's folder, in its order.

    Raises:
        UserError: There is no such file, or no path in it.
    """
    if not file.is_file():
        problem = "is a folder (use data.source=folder)" if file.is_dir() else "does not exist"
        raise UserError(f"{printable(file.absolute())} {problem}; data.source=list wants a text file, one path a line")
    names = [line for line in file.read_bytes().splitlines() if line.strip()]
    if not names:
        raise UserError(f"{printable(file.absolute())}: there is no path in this list")
    return FilePictures(file.parent, names, ignored=Counter(), labelled=False)


def walk(root: Path) -> tuple[list[bytes], Counter[str]]:
    """Pictures below a folder as sorted relative paths, and counts of what else there is, by extension.

    Links to folders are followed, each folder is visited once: loops end, and a picture has one path, the one without
    a link if there is one.
    """
    names: list[bytes] = []
    ignored: Counter[str] = Counter()
    visited: set[tuple[int, int]] = set()
    folders, linked = [b""], list[bytes]()  # still to visit, each with a slash at its end
    while folders or linked:
        if folders:
            folder = folders.pop()
        else:
            folder = min(linked)
            linked.remove(folder)
        path = os.path.join(os.fsencode(root), folder)  # noqa: PTH118 - bytes
        try:
            status = os.stat(path)  # noqa: PTH116 - bytes
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(path))
        except OSError:
            ignored["unreadable folder"] += 1
            continue
        for entry in entries:
            name = folder + entry.name
            if entry.name.startswith(b"."):
                ignored["hidden"] += 1
            elif _is_folder(entry):
                (linked if entry.is_symlink() else folders).append(name + b"/")
            elif extension(name) in EXTENSIONS and (entry.is_symlink() or entry.is_file()):
                names.append(name)
            else:
                ignored[extension(name)] += 1
    return sorted(names), ignored


def class_folders(names: list[bytes]) -> tuple[Tensor, list[str]]:
    """Labels (N,) and class names from the first folder of each path; none when a picture lies outside of such folders.

    `train`, `val` and `test` are no classes.
    """
    first = [os.fsdecode(name.partition(b"/")[0]) if b"/" in name else "" for name in names]
    classes = sorted(set(first))
    if "" in classes or SPLITS.issuperset(classes):
        return unlabelled(len(names))
    place = {name: label for label, name in enumerate(classes)}
    return torch.tensor([place[name] for name in first]), [printable(name) for name in classes]


def unlabelled(count: int) -> tuple[Tensor, list[str]]:
    """Labels (N,) all -1, and no class."""
    return torch.full((count,), -1), []


def extension(name: bytes) -> str:
    """The lower-case extension with its dot, printable."""
    return printable(os.path.splitext(name)[1].lower()) or "without extension"  # noqa: PTH122 - bytes


def counts(kinds: Counter[str], most: int = 8) -> str:
    """`12 .txt, 3 .pdf`: the most frequent kinds first."""
    listed = [f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    rest = [f"{len(listed) - most} more kinds"] if len(listed) > most else []
    return ", ".join(listed[:most] + rest)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
